"""Products of a few bf16 rows on a CPU: what decoding is made of.

With int8 weights torch has a product that reads them once, where they lie, and adds in fp32. With more rows it is
slower than to convert the weights and use BLAS. An adapter's small factors are multiplied in fp32, which they are in:
a product in bf16 takes 13 µs before it begins, one in fp32 takes 2 µs with all (AMD Zen 4, `x [1, 576]`, rank 16).
"""

from __future__ import annotations

from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["add_update", "can_read_once", "is_better_in_fp32", "read_once"]

_MOST_ROWS = 16
_WHOLE = 32
"""Inputs that torch's kernel may take at a time, and bytes that it may load as one. It looks neither whether inputs are
left over nor where numbers lie, and those of a mapped checkpoint lie anywhere."""


def can_read_once(x_NI: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether `read_once` takes these, where that pays: with this weight [O, I], or with each of a stack of such."""
    return (
        x_NI.dtype == torch.bfloat16
        and 0 < x_NI.shape[0] <= _MOST_ROWS
        and stored.dtype == torch.int8
        and stored.is_cpu
        and stored.shape[-1] % _WHOLE == 0
        and stored.is_contiguous()
        and not isinstance(x_NI, FakeTensor)
        and stored.data_ptr() % _WHOLE == x_NI.data_ptr() % _WHOLE == 0
        and _has_kernel()
    )


@cache
def _has_kernel() -> bool:
    """Elsewhere torch goes number by number."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def read_once(x_NI: torch.Tensor, stored_OI: torch.Tensor) -> torch.Tensor:
    """x Wᵀ without the weights' scale: [N, O] in bf16.

    torch would take scales in bf16, which puts each output off by up to 0.2%.
    """
    return torch._weight_int8pack_mm(x_NI.contiguous(), stored_OI, x_NI.new_ones(stored_OI.shape[0]))


def is_better_in_fp32(x: torch.Tensor, factor: torch.Tensor) -> bool:
    """Whether nothing but a few bf16 rows on a CPU is to be multiplied with a factor that is in fp32, for good."""
    return (
        x.dtype == torch.bfloat16
        and factor.dtype == torch.float32
        and x.is_cpu
        and 0 < x.shape[:-1].numel() <= _MOST_ROWS
        and not torch.is_grad_enabled()
        and not isinstance(x, FakeTensor)
    )


def add_update(y_NO: torch.Tensor, x_NI: torch.Tensor, A_RI: torch.Tensor, B_OR: torch.Tensor, scaling: float) -> None:
    """Add scaling (x Aᵀ) Bᵀ in place; computed in the factors' dtype."""
    low_NR = torch.mm(x_NI.to(A_RI.dtype), A_RI.t())
    y_NO.add_(torch.mm(low_NR, B_OR.t()), alpha=scaling)
