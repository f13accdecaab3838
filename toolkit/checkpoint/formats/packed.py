"""What a quantised weight is: its parts in the files, and the pure function that makes them fp32 again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch

__all__ = ["Packed", "Part", "Tensors"]

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """A tensor of the files, `key`, that a weight is made of.

    Rows of the weight (its dimension 0: outputs, or the experts of a stack) run along `axis` of this tensor, `rows` of
    them for one element there; a part without an axis is needed whole for any row.
    """

    key: str
    axis: int | None = 0
    rows: Fraction = Fraction(1)


@dataclass(frozen=True)
class Packed:
    """A weight stored in parts.

    Args:
        name: what it would be called as a plain tensor. shape: of that tensor.
        parts: by the names that `unpack` knows them under.
        unpack: some rows' parts to these rows in fp32, [rows, …] of `shape`; pure.
        stored: the format in words, for people: "int4, groups of 128".
        bytes: of its parts in the files.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    unpack: Callable[[Tensors], torch.Tensor]
    stored: str
    bytes: int

    @property
    def step(self) -> int:
        """The fewest rows that can be read by themselves; all of them where the parts do not divide."""
        rows = self.shape[0]
        step = math.lcm(*(part.rows.numerator for part in self.parts.values() if part.axis is not None))
        return step if step < rows and any(part.axis is not None for part in self.parts.values()) else rows

    def spans(self, first: int, last: int) -> Iterator[tuple[str, int | None, int, int]]:
        """Where rows `first` to `last` lie: (part, axis, from, to) of each; `first` is a multiple of `step`."""
        for name, part in self.parts.items():
            yield name, part.axis, math.floor(first / part.rows), math.ceil(last / part.rows)
