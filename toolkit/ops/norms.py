"""RMS norms by torch's own kernel on a card: one launch where a family's forward takes eight, its backward fourteen.

Every family writes the norm itself, and most, but not all, write the same function. So nobody's name is trusted: what a
module computes is looked at on numbers, and one that computes anything else stays as it is. A kernel rounds once where
families round twice, so nothing is replaced on a CPU, whose runs keep their bits.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from toolkit.ops.rows import is_fake

__all__ = ["FusedNorm", "fuse_norms", "fused_norms", "rms_norm_eps"]

_ROWS = 16
_SLACK = 4e-6
"""Relative error of a mean and a root in fp32 beside what rounding to the dtype adds."""


class FusedNorm(nn.Module):
    """weight · x / √(mean(x²) + eps) in the place of `stock`, under the same name in a state dict.

    `stock` is asked where x is not in the weight's dtype, so that the result's dtype is the family's choice.
    """

    def __init__(self, stock: nn.Module, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = stock.weight, eps
        self.__dict__["stock"] = stock  # no child: it has the same parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] to [..., H]."""
        weight: torch.Tensor = self.weight  # type: ignore[assignment]
        if x.dtype != weight.dtype:
            stock: Any = self.stock
            stock.weight = weight  # moved to another device, it may be another
            result: torch.Tensor = stock(x)
            return result
        if is_fake(x):
            shapes: torch.Tensor = _Shapes.apply(x, weight)
            return shapes
        device = x.device.type  # autocast would make it fp32
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return functional.rms_norm(x, weight.shape, weight, self.eps)

    def extra_repr(self) -> str:
        """As torch's."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"  # type: ignore[arg-type]


class _Shapes(torch.autograd.Function):
    """What the card's kernels allocate and keep: a plan's tensors have no numbers, and no card."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, weight = args
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def fuse_norms(model: nn.Module) -> None:
    """Put `FusedNorm` in the place of every norm of this function.

    Tensors are neither copied nor read, so the model may be on the meta device.
    """
    known: dict[Hashable, float | None] = {}
    for owner in list(model.modules()):
        for name, module in list(owner.named_children()):
            if isinstance(module, FusedNorm) or not _may_be_norm(module):
                continue
            key = _kind(module)
            if key not in known:
                known[key] = rms_norm_eps(module)
            if (eps := known[key]) is not None:
                setattr(owner, name, FusedNorm(module, eps))


def fused_norms(model: nn.Module) -> tuple[int, int]:
    """How many norms are fused, of how many modules that have one parameter, a `weight` with one axis."""
    norms = [module for module in model.modules() if _may_be_norm(module)]
    return sum(isinstance(norm, FusedNorm) for norm in norms), len(norms)


def _may_be_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return (
        own.keys() == {"weight"}
        and own["weight"].ndim == 1
        and not any(True for _ in module.children())
        and not isinstance(module, nn.RMSNorm)  # torch's already
    )


def _kind(module: nn.Module) -> Hashable:
    """All that tells norms apart: class, size, dtype, plain attributes."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | bool)}
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return type(module), tuple(weight.shape), weight.dtype, tuple(sorted(plain.items()))


@torch.no_grad()
def rms_norm_eps(module: nn.Module) -> float | None:
    """The eps of weight · x / √(mean(x²) + eps), where a module with such a `weight` computes that; None where not.

    A copy of it is asked on a CPU with another weight, in its own dtype, for rows of sizes from 1e-4 to 1e3, and
    compared with fp64: the weight and the normed row may be rounded once each.
    """
    if len(inspect.signature(module.forward).parameters) != 1 or any(True for _ in module.buffers()):
        return None
    with torch.device("cpu"):
        probe = copy.deepcopy(module).to_empty(device="cpu")
        weight: torch.Tensor = probe.weight  # type: ignore[assignment]
        size, dtype = weight.numel(), weight.dtype
        # No random numbers: a probe must not move the run's.
        weight.copy_(torch.arange(size).mul(0.3).cos().mul(1.5))
        wave = torch.arange(_ROWS * size).view(_ROWS, size).mul(0.7310585).sin()
        x = (wave * torch.logspace(-4, 3, _ROWS).unsqueeze(1)).to(dtype)
        try:
            found = probe(x)
        except (RuntimeError, TypeError, ValueError):
            return None
    if not isinstance(found, torch.Tensor) or found.shape != x.shape or found.dtype != dtype:
        return None
    for eps in _numbers(module):
        mean = x.double().square().mean(-1, keepdim=True)
        wanted = weight.double() * x.double() / (mean + eps).sqrt()
        if bool(((found - wanted).abs() <= (torch.finfo(dtype).eps + _SLACK) * wanted.abs()).all()):
            return eps
    return None


def _numbers(module: nn.Module) -> Iterator[float]:
    return (value for value in vars(module).values() if type(value) is float and value > 0)
