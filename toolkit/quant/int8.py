"""Row-wise symmetric int8: the one place that knows the storage format.

A weight is stored as int8 with one fp32 scale per output row, `w ≈ scale · q`, q in [-127, 127]. The scale never enters
an inner loop: it multiplies the product's columns in forward and the incoming gradient in backward. bitsandbytes stores
the same numbers, but only for `nn.Linear`, and multiplies with rounded activations.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Int8Linear", "dequantize", "quantize"]

_LEVELS = 127.0


def quantize(weight: torch.Tensor, input_dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a float weight to int8 with one scale per output row.

    Args:
        weight: [..., out, in], or [..., in, out] with `input_dim=-2`; a leading expert dimension is handled one
            expert at a time, so that only one expert exists in fp32.
        input_dim: -1 or -2, the dimension a scale is shared along.

    Returns:
        int8 of the same shape, and the fp32 scales [..., out].
    """
    if weight.dim() > 2:
        stored = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty((*weight.shape[:-2], weight.shape[-3 - input_dim]), device=weight.device)
        for index in range(weight.shape[0]):
            stored[index], scales[index] = quantize(weight[index], input_dim)
        return stored, scales
    values = weight.float()
    scale = values.abs().amax(dim=input_dim) / _LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (values / scale.unsqueeze(input_dim)).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8), scale


def dequantize(stored: torch.Tensor, scale: torch.Tensor, input_dim: int = -1) -> torch.Tensor:
    """The fp32 weight that `quantize` stored; shapes as there."""
    return stored.float() * scale.unsqueeze(input_dim)


class _Int8Matmul(torch.autograd.Function):
    """x [..., in] times a frozen int8 weight [out, in]; the gradient flows to x only."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *args: torch.Tensor) -> torch.Tensor:
        x, stored, scale = args
        ctx.save_for_backward(stored, scale)
        return (x @ stored.to(x.dtype).t()).mul_(scale.to(x.dtype))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        stored, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grads[0]
        return (grad * scale.to(grad.dtype)) @ stored.to(grad.dtype), None, None


class Int8Linear(nn.Linear):
    """A frozen linear layer with its weight in int8: weight [out, in] int8, weight_scale [out] fp32.

    It stays an `nn.Linear`, so PEFT wraps it with its own LoRA layer. Activations are not rounded, so a row's output
    never depends on its neighbours.
    """

    weight_scale: nn.Parameter

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """An empty twin of `linear`, on its device (meta while a checkpoint loads)."""
        with torch.device(linear.weight.device):
            twin = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=linear.weight.dtype)
            twin.weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=torch.int8), requires_grad=False)
            twin.weight_scale = nn.Parameter(torch.empty(linear.out_features), requires_grad=False)
        return twin

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        output: torch.Tensor = _Int8Matmul.apply(input, self.weight, self.weight_scale)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def reset_parameters(self) -> None:
        """Nothing to initialise: the weights come from a checkpoint."""
