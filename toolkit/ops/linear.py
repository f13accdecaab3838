"""An adapted int8 linear as one autograd function: `x Wᵀ + b + scaling (x Aᵀ) Bᵀ` into one output.

PEFT's layer makes the base's output, the update, the scaled update and their sum, each as large as the output, and
keeps what autograd wants of them. Here the update is added to the product where it stands, and backward keeps x and
x Aᵀ only.

    N rows, O outputs, I inputs, R rank
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from toolkit.ops.few_rows import add_update, is_better_in_fp32
from toolkit.ops.int8 import input_gradient, product

__all__ = ["adapted_linear"]


def adapted_linear(
    x: torch.Tensor,
    stored: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """x [..., I] to [..., O], in x's dtype, or in that of autocast where it is on.

    Args:
        stored: int8 [O, I], frozen. scale: fp32 [O]. bias: [O], frozen.
        A: [R, I]. B: [O, R].
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if is_better_in_fp32(x, A):
        y = product(x, stored, scale)
        if bias is not None:
            y.add_(bias)
        add_update(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), A, B, scaling)
        return y
    given = (x, A.to(x.dtype), B.to(x.dtype), stored, scale, bias, scaling)
    if not torch.is_grad_enabled():
        return _forward(*given)[0]
    output: torch.Tensor = _AdaptedLinear.apply(*given)
    return output


def _forward(
    x: torch.Tensor,
    A_RI: torch.Tensor,
    B_OR: torch.Tensor,
    stored: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [..., O], and x Aᵀ [N, R]."""
    device = x.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = product(x_NI, stored, scale)
        if bias is not None:
            y_NO.add_(bias.to(x.dtype))
        low_NR = x_NI @ A_RI.t()
        y_NO.addmm_(low_NR, B_OR.t(), alpha=scaling)
    return y_NO.view(*x.shape[:-1], -1), low_NR


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, A_RI, B_OR, stored, scale, _, scaling = args
        output, low_NR = _forward(*args)
        ctx.save_for_backward(x, low_NR, A_RI, B_OR, stored, scale)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low_NR, A_RI, B_OR, stored, scale = ctx.saved_tensors
        grad_NO, grad_x = grads[0].reshape(-1, B_OR.shape[0]), None
        with torch.autocast(x.device.type, enabled=False):
            grad_NR = (grad_NO @ B_OR).mul_(ctx.scaling)
            if ctx.needs_input_grad[0]:
                grad_x = input_gradient(grad_NO, stored, scale).addmm_(grad_NR, A_RI).view(x.shape)
            grad_A = grad_NR.t() @ x.reshape(-1, x.shape[-1])
            grad_B = ((low_NR * ctx.scaling).t() @ grad_NO).t()
        return grad_x, grad_A, grad_B, None, None, None, None
