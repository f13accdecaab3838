"""How large a piece of a product one program takes, and what a card can hold of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton

__all__ = ["INTERPRETED", "Tile", "candidates", "default_tile", "power_of_two"]

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
