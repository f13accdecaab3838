"""What a quantised weight is: its parts in the files, and the pure function that makes them fp32 again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from toolkit.checkpoint.files import Header
from toolkit.errors import ModelError

__all__ = ["FLOATS", "Encoder", "Files", "FourBit", "Packed", "Part", "Tensors", "Unpack"]

FLOATS = ("BF16", "F16", "F32")
"""What scales are mostly stored in."""

Tensors = Mapping[str, torch.Tensor]
Unpack = Callable[[Tensors], torch.Tensor]


@dataclass(frozen=True)
class Part:
    """A tensor of the files, `key`, that a weight is made of.

    Rows of the weight (its dimension 0: outputs, or the experts of a stack) run along `axis` of this tensor, `rows` of
    them for one element there, and `unit` of them only together; a part without an axis is needed whole for any row.
    """

    key: str
    axis: int | None = 0
    rows: Fraction = Fraction(1)
    unit: int = 1


@dataclass(frozen=True)
class FourBit:
    """How a weight of four bits can be kept as it is: `codes` gives its codes of 0 to 15, uint8 [..., O, I], and their
    scales [..., O, I/G].

    `kind` is mxfp4 (E2M1 codes, E8M0 scales in uint8) or grouped (a code less 8, times its scale, in `dtype`).
    """

    kind: str
    group: int
    codes: Callable[[Tensors], tuple[torch.Tensor, torch.Tensor]]
    dtype: str = "U8"

    @property
    def name(self) -> str:
        """One word that says it all: mxfp4, or grouped:128:BF16."""
        return self.kind if self.kind == "mxfp4" else f"{self.kind}:{self.group}:{self.dtype}"


@dataclass(frozen=True)
class Encoder:
    """How other values are written into a weight's own parts: its scales and zero points stay, its codes are new.

    A value is level · scale + offset. `levels` are the numbers that codes stand for, ascending. `units` gives scale and
    offset of some rows' parts, fp32 and broadcast to [rows, …] of the weight; no offset is None. `store` makes the
    parts that hold codes, in their own dtype, of levels [rows, …] and the parts as they were. All pure.
    """

    levels: tuple[float, ...]
    units: Callable[[Tensors], tuple[torch.Tensor, torch.Tensor | None]]
    store: Callable[[torch.Tensor, Tensors], dict[str, torch.Tensor]]

    def encode(
        self, values: torch.Tensor, parts: Tensors, chance: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The parts that hold codes, of the levels that are nearest to fp32 values [rows, …].

        Args:
            chance: numbers of 0 to 1 in the values' shape, drawn evenly. With them a value between two levels takes the
                upper one as often as it is near to that, so that the mean of what is written is the value.
        """
        scale, offset = self.units(parts)
        wanted = ((values if offset is None else values - offset) / scale).nan_to_num(0.0)
        return self.store(self._nearest(wanted) if chance is None else self._in_the_mean(wanted, chance), parts)

    def _nearest(self, wanted: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor(self.levels, device=wanted.device)
        return levels[torch.bucketize(wanted.contiguous(), (levels[1:] + levels[:-1]) / 2)]

    def _in_the_mean(self, wanted: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
        levels, nearest = torch.tensor(self.levels, device=wanted.device), self._nearest(wanted)
        above = torch.bucketize(wanted.contiguous(), levels).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        taken = torch.where(chance < (wanted - low) / (high - low), high, low)
        # What was on a level stays there, though a division may have moved it by a last bit.
        return torch.where((wanted - nearest).abs() <= _ROUNDOFF * nearest.abs(), nearest, taken)


_ROUNDOFF = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Packed:
    """A weight stored in parts.

    Args:
        name: what it would be called as a plain tensor. shape: of that tensor.
        parts: by the names that `unpack` knows them under.
        unpack: some rows' parts to these rows in fp32, [rows, …] of `shape`; pure.
        stored: the format in words, for people: "int4, groups of 128".
        bytes: of its parts in the files. four_bit: where it can be kept as it is stored.
        encoder: where other values can be written in this format.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    unpack: Unpack
    stored: str
    bytes: int
    four_bit: FourBit | None = None
    encoder: Encoder | None = None

    @property
    def step(self) -> int:
        """The fewest rows that can be read by themselves; all of them where the parts do not divide."""
        divided = [math.lcm(part.rows.numerator, part.unit) for part in self.parts.values() if part.axis is not None]
        return min(math.lcm(*divided), self.shape[0]) if divided else self.shape[0]

    def spans(self, first: int, last: int) -> Iterator[tuple[str, int | None, int, int]]:
        """Where rows `first` to `last` lie: (part, axis, from, to) of each; `first` is a multiple of `step`."""
        for name, part in self.parts.items():
            many, one = part.rows.numerator, part.rows.denominator
            yield name, part.axis, first * one // many, -(-last * one // many)


@dataclass(frozen=True)
class Files:
    """What the headers of a checkpoint say, as a format's reader sees it.

    Args:
        name: of the checkpoint, for errors. headers: of every tensor by its key.
        declared: the quantization_config. value: reads a small tensor by its key.
        metadata: of the files' headers.
    """

    name: str
    headers: Mapping[str, Header]
    declared: Mapping[str, Any]
    value: Callable[[str], torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def modules(self, leaf: str) -> Iterator[str]:
        """Names of modules with a tensor `leaf`, in the files' order."""
        return (key.removesuffix(f".{leaf}") for key in self.headers if key.endswith(f".{leaf}"))

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor that has to be there.

        Raises:
            ModelError: it is not, or holds nothing.
        """
        if key not in self.headers:
            raise ModelError(f"{self.name}: lacks {key}, a part of a quantised weight; download the checkpoint again")
        if 0 in self.headers[key].shape:
            raise self.wrong(key, "holds nothing")
        return self.headers[key].shape

    def matrix(self, key: str) -> tuple[int, int]:
        """The shape of a tensor that has to be there, with two dimensions.

        Raises:
            ModelError: it is not, or has others.
        """
        shape = self.shape(key)
        if len(shape) != 2:
            raise self.wrong(key, f"has {len(shape)} dimensions, not 2")
        return shape[0], shape[1]

    def check_dtype(self, key: str, *allowed: str) -> None:
        """That a tensor is there in one of these dtypes.

        Raises:
            ModelError: it is not.
        """
        self.shape(key)
        if (dtype := self.headers[key].dtype) not in allowed:
            raise self.wrong(key, f"is stored in {dtype}, not {' or '.join(allowed)}")

    def check_one(self, key: str, *allowed: str) -> None:
        """That a tensor of one number is there.

        Raises:
            ModelError: it is not.
        """
        self.check_dtype(key, *allowed)
        if math.prod(self.shape(key)) != 1:
            raise self.wrong(key, "is not one number")

    def check_order(self, key: str, inputs: int, groups: int) -> None:
        """That a tensor names a group for each input.

        Raises:
            ModelError: it has another length, or names a group that is not there.
        """
        self.check_dtype(key, "I32", "I64")
        found = self.value(key)
        if self.shape(key) != (inputs,) or int(found.min()) < 0 or int(found.max()) >= groups:
            raise self.wrong(key, f"does not name one of {groups} groups for each of {inputs} inputs")

    def wrong(self, key: str, why: str) -> ModelError:
        """The error of a weight that cannot be read."""
        return ModelError(f"{self.name}: {key}: {why}; take the unquantised checkpoint, or download this one again")

    def not_read(self, key: str, what: str) -> ModelError:
        """The error of something that no reader knows."""
        return ModelError(
            f"{self.name}: {key}: {what}, which is not read; take the unquantised checkpoint of this model"
        )

    def packed(
        self,
        name: str,
        shape: tuple[int, ...],
        parts: Mapping[str, Part],
        unpack: Unpack,
        stored: str,
        four_bit: FourBit | None = None,
        encoder: Encoder | None = None,
    ) -> Packed:
        """A weight of these parts, all of them there.

        Raises:
            ModelError: one is missing.
        """
        for part in parts.values():
            self.shape(part.key)
        size = sum(self.headers[part.key].bytes for part in parts.values())
        return Packed(name, shape, parts, unpack, stored, size, four_bit, encoder)
