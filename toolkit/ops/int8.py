"""Row-wise symmetric int8: the one place that knows the storage format.

A weight is stored as int8 with one fp32 scale per output row, `w ≈ scale · q`, q in [-127, 127]. The scale never enters
an inner loop: it multiplies the product's columns in forward and the incoming gradient in backward. bitsandbytes stores
the same numbers, but only for `nn.Linear`, and multiplies with rounded activations.
"""

from __future__ import annotations

import torch
from torch import nn

from toolkit.ops.few_rows import can_read_once, read_once
from toolkit.ops.split_int8 import can_multiply, multiply

__all__ = ["Int8Linear", "dequantize", "input_gradient", "product", "quantize", "scratch_for"]

_LEVELS = 127.0
_BLOCK = 1 << 20
"""Elements rounded at a time on a CPU, in memory that is used again: fresh pages cost more than the arithmetic."""


def quantize(
    weight: torch.Tensor,
    input_dim: int = -1,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    scratch: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a float weight to int8 with one scale per output row.

    Args:
        weight: [..., out, in], or [..., in, out] with `input_dim=-2`. On a CPU only a few rows at a time exist in fp32,
            elsewhere one matrix.
        input_dim: -1 or -2, the dimension a scale is shared along.
        out: where to write; new tensors by default.
        scratch: from `scratch_for`, to reuse between calls.

    Returns:
        int8 of the same shape, and the fp32 scales [..., out].
    """
    output_dim = -3 - input_dim
    if out is None:
        stored = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        shape = (*weight.shape[:-2], weight.shape[output_dim])
        out = stored, torch.empty(shape, dtype=torch.float32, device=weight.device)
    scratch = scratch_for(weight) if scratch is None else scratch
    if weight.dim() > 2:
        for matrix, stored, scale in zip(weight, *out, strict=True):
            quantize(matrix, input_dim, out=(stored, scale), scratch=scratch)
        return out
    step = max(1, scratch.shape[1] // max(1, weight.shape[input_dim]))
    parts = [tensor.split(step, dim=output_dim) for tensor in (weight, out[0])]
    for block, target, scale in zip(*parts, out[1].split(step), strict=True):
        _quantize_block(block, target, scale, scratch[:, : block.numel()].view(2, *block.shape), input_dim)
    return out


def scratch_for(weight: torch.Tensor) -> torch.Tensor:
    """Room [2, elements] in fp32 that `quantize` needs for this weight: a few rows on a CPU, elsewhere one matrix."""
    rows, columns = weight.shape[-2:]
    block = max(_BLOCK, rows, columns) if weight.device.type == "cpu" else rows * columns
    return torch.empty((2, min(block, rows * columns)), dtype=torch.float32, device=weight.device)


@torch.no_grad()
def _quantize_block(
    block: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, scratch: torch.Tensor, input_dim: int
) -> None:
    values, magnitudes = scratch
    torch.abs(values.copy_(block), out=magnitudes)
    torch.div(magnitudes.amax(dim=input_dim), _LEVELS, out=scale)
    # Below the smallest normal number a scale loses its precision and quotients could pass 127: such rows become zero.
    scale.masked_fill_(scale < torch.finfo(scale.dtype).tiny, 1.0)
    target.copy_(values.div_(scale.unsqueeze(input_dim)).round_())


def dequantize(stored: torch.Tensor, scale: torch.Tensor, input_dim: int = -1) -> torch.Tensor:
    """The fp32 weight that `quantize` stored; shapes as there."""
    return stored.float() * scale.unsqueeze(input_dim)


def product(x: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [..., in] times an int8 weight [out, in] with its scales [out]: [..., out], in x's dtype.

    Scales stay in fp32: rounded to bf16 each would put its own row off by up to 0.2%, always in the same direction.
    """
    return _times(x, stored, transposed=True).mul_(scale)


def input_gradient(grad: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The gradient of `product`'s x [..., in] from that of its result [..., out]."""
    return _times(torch.mul(grad, scale, out=torch.empty_like(grad)), stored, transposed=False)


def _times(x: torch.Tensor, stored: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    if can_multiply(x, stored):
        return multiply(x.reshape(-1, x.shape[-1]), stored, transposed=transposed).view(*x.shape[:-1], -1)
    if transposed and can_read_once(x_NI := x.reshape(-1, x.shape[-1]), stored):
        return read_once(x_NI, stored).view(*x.shape[:-1], -1)
    weight = stored.to(x.dtype)
    return x @ (weight.t() if transposed else weight)


class _Int8Matmul(torch.autograd.Function):
    """x [..., in] times a frozen int8 weight [out, in]; the gradient flows to x only."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *args: torch.Tensor) -> torch.Tensor:
        x, stored, scale = args
        ctx.save_for_backward(stored, scale)
        return product(x, stored, scale)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        stored, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        return input_gradient(grads[0], stored, scale), None, None


class Int8Linear(nn.Linear):
    """A frozen linear layer with its weight in int8: weight [out, in] int8, weight_scale [out] fp32.

    It stays an `nn.Linear`, so PEFT wraps it with its own LoRA layer. Activations are not rounded and rows share
    no scale: of its neighbours a row's output feels at most how fp32 products of more rows are rounded.
    """

    weight_scale: nn.Parameter

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """An empty twin of `linear`, on its device (meta while a checkpoint loads)."""
        with torch.device(linear.weight.device):
            twin = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=linear.weight.dtype)
            twin.weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=torch.int8), requires_grad=False)
            twin.weight_scale = nn.Parameter(torch.empty(linear.out_features, dtype=torch.float32), requires_grad=False)
        return twin

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        times = _Int8Matmul.apply if torch.is_grad_enabled() else product
        output: torch.Tensor = times(input, self.weight, self.weight_scale)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def reset_parameters(self) -> None:
        """Nothing to initialise: the weights come from a checkpoint."""
