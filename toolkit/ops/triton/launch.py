"""One grouped product, two ways: a kernel that reads weights as stored, and torch's own on a few dequantised experts.

The second costs a copy of the weights and a wait for the routing, but multiplies at the library's rate; which is faster
depends on the card and the shape, so `tune.py` times both. Neither has run on a card yet.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
from torch.nn import functional

from toolkit.ops import four_bit
from toolkit.ops.four_bit import FourBits
from toolkit.ops.triton import four_bit_kernels, kernels
from toolkit.ops.triton.tiles import (
    INTERPRETED,
    Tile,
    candidates,
    four_bit_candidates,
    power_of_two,
)

__all__ = ["Product", "chunked", "compile_tiles", "fused", "outputs_of", "tiles_of"]

_CHUNK_BYTES = 64 << 20
"""Dequantised weights at a time: little beside a layer's rows, and within a large card's second-level cache."""


@dataclass(frozen=True)
class Product:
    """The arguments of `onecard::grouped_gemm`, which explains them."""

    x: torch.Tensor
    weight: torch.Tensor
    offset: torch.Tensor
    row: torch.Tensor | None
    dtype: torch.dtype
    is_swapped: bool = False
    scale: torch.Tensor | None = None
    is_scale_on_input: bool = False
    bias: torch.Tensor | None = None
    x_unit: torch.Tensor | None = None
    low: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    is_factor_swapped: bool = False
    addend: torch.Tensor | None = None
    step: torch.Tensor | None = None

    @property
    def four_bits(self) -> FourBits | None:
        """The stack as it is stored, where it is of four bits."""
        if self.scale is None or four_bit.kind_of(self.weight, self.scale, self.step) is None:
            return None
        return FourBits(self.weight, self.scale, self.step)

    @property
    def experts(self) -> int:
        """E."""
        return self.weight.shape[0]

    @property
    def rows(self) -> int:
        """S."""
        return (self.x if self.row is None else self.row).shape[0]

    @property
    def outputs(self) -> int:
        """N."""
        return outputs_of(self.weight, self.is_swapped)

    @property
    def rank(self) -> int:
        """R, 0 without a low-rank update."""
        return 0 if self.low is None else self.low.shape[1]

    def empty(self) -> torch.Tensor:
        """Room for the result."""
        return torch.empty((self.rows, self.outputs), dtype=self.dtype, device=self.x.device)


def outputs_of(weight: torch.Tensor, is_swapped: bool) -> int:
    """N of a weight [E, N, K], or [E, K, N] where swapped; a byte of four bits is two of its rows."""
    return weight.shape[2] if is_swapped else weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


def fused(product: Product, tile: Tile | None = None) -> torch.Tensor:
    """By the kernel, with this tile or the default one."""
    out = product.empty()
    if out.numel():
        kernel, grid, arguments, options = _call(product, out, tile or _default(product))
        kernel[grid](*arguments, **options)
    return out


def tiles_of(product: Product) -> list[Tile]:
    """Tiles worth timing, the default first."""
    p = product
    if p.four_bits is None:
        return candidates(max(1, p.rows // p.experts), p.outputs, p.x.element_size())
    columns, is_gradient = p.weight.shape[1 if not p.is_swapped else 2], not p.is_swapped
    return four_bit_candidates(max(1, p.rows // p.experts), columns, p.x.element_size(), is_gradient=is_gradient)


def compile_tiles(product: Product, tiles: Sequence[Tile]) -> None:
    """Compile the kernel for several tiles at a time. One that does not compile says so when it is used."""
    out, threads = product.empty(), min(len(tiles), len(os.sched_getaffinity(0)))
    if not out.numel():
        return
    with ThreadPoolExecutor(threads) as executor, triton.AsyncCompileMode(executor, ignore_errors=True):
        for tile in tiles:
            kernel, grid, arguments, options = _call(product, out, tile)
            kernel.warmup(*arguments, grid=grid, **options)


def _default(p: Product) -> Tile:
    return tiles_of(p)[0]


_Call = tuple[Any, tuple[int], tuple[Any, ...], dict[str, Any]]


def _call(p: Product, out: torch.Tensor, tile: Tile) -> _Call:
    """A kernel with its grid, arguments and options."""
    stored = p.four_bits
    if stored is not None:
        return _four_bit_call(p, stored, out, tile)
    N, K = p.outputs, p.x.shape[-1]
    arguments = (
        p.x.contiguous(), p.row, p.offset, p.weight, p.scale, p.bias, p.x_unit, p.low, p.factor, p.addend,
        out, N, K, p.rank, *_strides(p.weight, p.is_swapped), *_factor_strides(p),
    )  # fmt: skip
    options = _options(p, tile) | {
        "SCALE_ON_INPUT": p.is_scale_on_input and p.scale is not None,
        "BLOCK_N": tile.n, "BLOCK_K": tile.k, "EVEN_K": K % tile.k == 0,
    }  # fmt: skip
    return kernels.grouped_gemm_kernel, (_row_tiles(p, tile) * triton.cdiv(N, tile.n),), arguments, options


def _four_bit_call(p: Product, stored: FourBits, out: torch.Tensor, tile: Tile) -> _Call:
    unit, scale = (stored.scale, None) if stored.step is None else (stored.step, stored.scale)
    assert stored.packed.is_contiguous()
    assert unit.is_contiguous()
    (_, half, outputs), group = stored.packed.shape, four_bit.group_of(stored)
    is_int8 = p.x_unit is not None
    assert p.is_swapped or not is_int8
    # Whole-number units take 32 numbers in a row.
    block_n, block_k = (tile.n, max(tile.k // 2, 32 if is_int8 else 16)) if p.is_swapped else (tile.n // 2, tile.k)
    columns, depth, along = (outputs, half, block_k) if p.is_swapped else (half, outputs, block_n)
    kernel = four_bit_kernels.four_bit_forward_kernel if p.is_swapped else four_bit_kernels.four_bit_gradient_kernel
    arguments = (
        p.x.contiguous(), p.row, p.offset, stored.packed, unit, scale, p.bias, *((p.x_unit,) if p.is_swapped else ()),
        p.low, p.factor, p.addend, out, half, outputs, p.rank, *_factor_strides(p),
    )  # fmt: skip
    options = _options(p, tile) | {
        "KIND": four_bit.kind_of(stored.packed, stored.scale, stored.step), "G": group, "RUN": math.gcd(group, along),
        "BLOCK_N": block_n, "BLOCK_K": block_k, "EVEN_K": depth % block_k == 0,
    }  # fmt: skip
    return kernel, (_row_tiles(p, tile) * triton.cdiv(columns, block_n),), arguments, options


def _row_tiles(p: Product, tile: Tile) -> int:
    """Every tile but one an expert is full, so this bound needs no look at the routing."""
    full: int = triton.cdiv(p.rows, tile.m)
    return min(full + p.experts, p.rows)


def _options(p: Product, tile: Tile) -> dict[str, Any]:
    return {
        "E": p.experts, "BLOCK_E": power_of_two(p.experts, least=1), "BLOCK_M": tile.m,
        "BLOCK_R": power_of_two(p.rank, most=64), "GROUP_N": tile.group, "UPCAST": INTERPRETED,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _factor_strides(p: Product) -> tuple[int, int, int]:
    return (0, 0, 0) if p.factor is None else _strides(p.factor, p.is_factor_swapped)


def _strides(stack: torch.Tensor, is_swapped: bool) -> tuple[int, int, int]:
    """Of expert, output and input."""
    e, first, second = stack.stride()
    return (e, second, first) if is_swapped else (e, first, second)


def chunked(product: Product) -> torch.Tensor:
    """By torch's grouped product on a few dequantised experts at a time. Waits for the routing; rows must be float."""
    p, out = product, product.empty()
    bounds = p.offset.tolist()
    for first, weight_cKN in _dequantized(p):
        last = first + weight_cKN.shape[0]
        start, end = bounds[first], bounds[last]
        if start < end:
            rows = p.x[start:end] if p.row is None else p.x[p.row[start:end].long()]
            ends = p.offset[first + 1 : last + 1] - start
            out[start:end] = functional.grouped_mm(rows, weight_cKN, offs=ends, out_dtype=p.dtype)
    if p.bias is not None:
        for expert, (start, end) in enumerate(pairwise(bounds)):
            out[start:end] += p.bias[expert].to(p.dtype)
    if p.addend is not None:
        out.add_(p.addend)
    if p.low is None or p.factor is None:
        return out
    return fused(Product(p.low, p.factor, p.offset, None, p.dtype, p.is_factor_swapped, addend=out))


def _dequantized(p: Product) -> Iterator[tuple[int, torch.Tensor]]:
    """Experts' numbers and matrices [c, K, N] in the rows' dtype, in one buffer that is used again."""
    if p.four_bits is not None:
        yield from _unpacked(p, p.four_bits)
        return
    matrix = p.weight.shape[1] * p.weight.shape[2] * p.x.element_size()
    count = min(p.experts, max(1, _CHUNK_BYTES // matrix))
    buffer = torch.empty((count, *p.weight.shape[1:]), dtype=p.x.dtype, device=p.x.device)
    # The scale lies along the weight's stored rows or columns: its own axis is N, or K, of [N, K] or [K, N].
    spread = 1 if p.is_scale_on_input != p.is_swapped else 2
    for first in range(0, p.experts, count):
        stored = p.weight[first : first + count]
        target = buffer[: stored.shape[0]]
        if p.scale is None:
            target.copy_(stored)
        else:  # multiplied in fp32, rounded once
            torch.mul(stored, p.scale[first : first + count].unsqueeze(spread), out=target)
        yield first, target if p.is_swapped else target.transpose(1, 2)


def _unpacked(p: Product, stored: FourBits) -> Iterator[tuple[int, torch.Tensor]]:
    """The same of four bits, expert by expert into the buffer: what unpacking needs beside it is one expert's."""
    _, half, outputs = stored.packed.shape
    count = min(p.experts, max(1, _CHUNK_BYTES // (2 * half * outputs * p.x.element_size())))
    buffer = torch.empty((count, 2 * half, outputs), dtype=p.x.dtype, device=p.x.device)
    for first in range(0, p.experts, count):
        target = buffer[: min(count, p.experts - first)]
        for whole, expert in zip(target, range(first, p.experts), strict=False):
            mine = FourBits(*(None if part is None else part[expert] for part in stored))  # type: ignore[arg-type]
            low, high = whole.chunk(2)
            four_bit.rows_into(low, high, mine, 0, half)
            if mine.step is not None:
                whole.mul_(mine.scale)
        yield first, target if p.is_swapped else target.transpose(1, 2)
