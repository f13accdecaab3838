"""How large a piece of a product one program takes, and what a card can hold of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton

__all__ = [
    "INTERPRETED",
    "Tile",
    "candidates",
    "default_tile",
    "four_bit_candidates",
    "four_bit_tile",
    "power_of_two",
]

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 was set before triton was imported."""


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of one program's piece; column blocks side by side; warps and pipeline stages."""

    m: int
    n: int
    k: int
    group: int = 8
    warps: int = 4
    stages: int = 3

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}g{self.group}w{self.warps}s{self.stages}"


def power_of_two(value: int, least: int = 16, most: int = 1 << 30) -> int:
    """The power of two from `value` up, within bounds that are powers of two themselves."""
    return min(max(1 << max(0, value - 1).bit_length(), least), most)


def default_tile(rows: int, columns: int, itemsize: int) -> Tile:
    """For `rows` rows an expert on average and elements of `itemsize` bytes; within 99 KB of shared memory.

    One byte means two digits, and sums for each.
    """
    if INTERPRETED:  # small, so that small shapes still take several
        return Tile(16, 32, 32)
    m = power_of_two(rows, most=64 if itemsize == 4 else 128)
    n = power_of_two(columns, most=128 if itemsize == 2 else 64)
    sums = m * n * (2 if itemsize == 1 else 1)
    return Tile(m, n, k=32 if itemsize == 4 else 64, warps=8 if sums >= 128 * 128 else 4)


def candidates(rows: int, columns: int, itemsize: int) -> list[Tile]:
    """Tiles worth timing, the default first."""
    first = default_tile(rows, columns, itemsize)
    others = [
        replace(first, stages=4),
        replace(first, warps=12 - first.warps),
        replace(first, k=first.k // 2, stages=4),
        replace(first, m=max(16, first.m // 2)),
        replace(first, n=max(16, first.n // 2)),
        replace(first, group=2),
    ]
    return list(dict.fromkeys([first, *others]))


def four_bit_tile(rows: int, columns: int, itemsize: int, *, is_gradient: bool) -> Tile:
    """The same for weights of four bits: fewer rows than columns of bytes, so that warps do not unpack a byte twice.

    Columns and depth are the product's. A byte is two of the columns of an input gradient, else two of the depth.
    """
    if INTERPRETED:
        return Tile(16, 32, 32)
    n = power_of_two(columns, least=32, most=64 if itemsize == 4 else 128)
    m = power_of_two(rows, most=max(16, n // 2))
    wide = (2 * n, 16 if itemsize == 4 else 32) if is_gradient else (n, 32 if itemsize == 4 else 64)
    return Tile(m, *wide, warps=8 if m * n >= 64 * 64 else 4)


def four_bit_candidates(rows: int, columns: int, itemsize: int, *, is_gradient: bool) -> list[Tile]:
    """Tiles worth timing for weights of four bits, the default first."""
    first = four_bit_tile(rows, columns, itemsize, is_gradient=is_gradient)
    others = [
        replace(first, stages=4),
        replace(first, warps=12 - first.warps),
        replace(first, k=2 * first.k),
        replace(first, m=max(16, first.m // 2)),
        replace(first, m=2 * first.m, warps=8),
        replace(first, group=2),
    ]
    return list(dict.fromkeys([first, *others]))
