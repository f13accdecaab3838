"""One grouped product, two ways: the int8 kernel, and torch's own product on a few dequantised experts at a time.

The second costs a copy of the weights and a wait for the routing, but multiplies at the library's rate; which is faster
depends on the card and the shape, so `tune.py` times both. Neither has run on a card yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
from torch.nn import functional

from toolkit.ops.triton import kernels
from toolkit.ops.triton.tiles import INTERPRETED, Tile, default_tile, power_of_two

__all__ = ["Product", "chunked", "compile_tiles", "fused"]

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
        return self.weight.shape[2 if self.is_swapped else 1]

    @property
    def rank(self) -> int:
        """R, 0 without a low-rank update."""
        return 0 if self.low is None else self.low.shape[1]

    def empty(self) -> torch.Tensor:
        """Room for the result."""
        return torch.empty((self.rows, self.outputs), dtype=self.dtype, device=self.x.device)


def fused(product: Product, tile: Tile | None = None) -> torch.Tensor:
    """By the kernel, with this tile or the default one."""
    out = product.empty()
    if out.numel():
        grid, arguments, options = _call(product, out, tile or _default(product))
        kernels.grouped_gemm_kernel[grid](*arguments, **options)
    return out


def compile_tiles(product: Product, tiles: Sequence[Tile]) -> None:
    """Compile the kernel for several tiles at a time. One that does not compile says so when it is used."""
    out, threads = product.empty(), min(len(tiles), len(os.sched_getaffinity(0)))
    if not out.numel():
        return
    with ThreadPoolExecutor(threads) as executor, triton.AsyncCompileMode(executor, ignore_errors=True):
        for tile in tiles:
            grid, arguments, options = _call(product, out, tile)
            kernels.grouped_gemm_kernel.warmup(*arguments, grid=grid, **options)


def _default(p: Product) -> Tile:
    return default_tile(max(1, p.rows // p.experts), p.outputs, p.x.element_size())


def _call(p: Product, out: torch.Tensor, tile: Tile) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """The kernel's grid, arguments and options."""
    E, N, K = p.experts, p.outputs, p.x.shape[-1]
    # Every tile but one an expert is full, so this bound needs no look at the routing.
    tiles = min(triton.cdiv(p.rows, tile.m) + E, p.rows)
    factor_strides = (0, 0, 0) if p.factor is None else _strides(p.factor, p.is_factor_swapped)
    arguments = (
        p.x.contiguous(), p.row, p.offset, p.weight, p.scale, p.bias, p.x_unit, p.low, p.factor, p.addend,
        out, N, K, p.rank, *_strides(p.weight, p.is_swapped), *factor_strides,
    )  # fmt: skip
    options = {
        "E": E, "BLOCK_E": power_of_two(E, least=1), "SCALE_ON_INPUT": p.is_scale_on_input and p.scale is not None,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": power_of_two(p.rank, most=64),
        "GROUP_N": tile.group, "EVEN_K": K % tile.k == 0, "UPCAST": INTERPRETED,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return (tiles * triton.cdiv(N, tile.n),), arguments, options


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
