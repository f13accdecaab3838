"""Operators that the CPU does not have, or not with the same arguments, in plain torch: their replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["INSTEAD"]


def _product(*args: torch.Tensor, out: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """`mm` and `addmm` with an `out_dtype`: the CPU has none."""
    widened = [
        value.float() if isinstance(value, torch.Tensor) else value
        for value in args
        if not isinstance(value, torch.dtype)
    ]
    result = torch.mm(*widened) if len(widened) == 2 else torch.addmm(*widened, **options)
    return result if out is None else out.copy_(result)


def _histogram(values: torch.Tensor, *bins: Any, **options: Any) -> torch.Tensor:
    """`histc` of whole numbers."""
    return torch.histc(values.double(), *bins, **options).to(values.dtype)


def _softmax(values: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    """Of 16-bit numbers in fp32, too."""
    return torch.softmax(values.float() if half_to_float else values, dim)


def _softmax_backward(grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The gradient in the dtype of what was put in."""
    weighted = grad.float() * output.float()
    return (weighted - output.float() * weighted.sum(dim, keepdim=True)).to(dtype)


def _rms_norm(x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """In fp32, rounded once; and the root."""
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * rstd * weight.float()).to(x.dtype), rstd


def _rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    shape: Sequence[int],
    rstd: torch.Tensor,
    weight: torch.Tensor,
    mask: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Of x, and of the weight where the mask wants it."""
    normed, weighted = x.float() * rstd, grad.float() * weight.float()
    slope = rstd * (weighted - normed * (normed * weighted).mean(-1, keepdim=True))
    grad_weight = (grad.float() * normed).flatten(0, -2).sum(0).to(weight.dtype) if mask[1] else None
    return slope.to(x.dtype), grad_weight


INSTEAD: dict[str, Callable[..., Any]] = {
    "aten._fused_rms_norm.default": _rms_norm,
    "aten._fused_rms_norm_backward.default": _rms_norm_backward,
    "aten.histc.default": _histogram,
    "aten._softmax.default": _softmax,
    "aten._softmax_backward_data.default": _softmax_backward,
    **{f"aten.{name}.{kind}": _product for name in ("mm", "addmm") for kind in ("dtype", "dtype_out")},
}
"""By the operator's name with its overload."""
