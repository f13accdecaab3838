"""A checkpoint as plain weights: what is quantised looks like a slice of safetensors and is multiplied out when read.

transformers' own key conversions then see a checkpoint that was never quantised. Nothing larger than one expert, or
than a block of rows, exists in fp32 at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor

from toolkit.checkpoint.formats.packed import Packed, Part

__all__ = ["PackedSlice", "StackSlice", "Unread", "unread"]

_BLOCK = 4 << 20
"""Values multiplied out at a time where a whole weight is read: 16 MiB in fp32."""


class Unread(ABC):
    """Rows of a weight that is not read yet, as safetensors' `get_slice` gives them for a plain one.

    Args:
        shape: of the weight. rows: first and last, all by default.
    """

    def __init__(self, shape: Sequence[int], rows: tuple[int, int] | None = None) -> None:
        self._whole = tuple(shape)
        self._first, self._last = rows or (0, self._whole[0])

    def get_shape(self) -> list[int]:
        """Of what it becomes."""
        return [self._last - self._first, *self._whole[1:]]

    @property
    def shape(self) -> torch.Size:
        """As `get_shape`."""
        return torch.Size(self.get_shape())

    def dim(self) -> int:
        """Dimensions."""
        return len(self._whole)

    def __getitem__(self, index: Any) -> Self:
        """All of it by `...`, or some rows by a slice; still unread."""
        if index is Ellipsis:
            return self
        first, last, _ = index.indices(self._last - self._first)
        return self._of(self._first + first, self._first + last)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Any:
        """A tensor where a dtype is asked for; a move alone waits until it is read."""
        return self if dtype is None else self.read(device or "cpu", dtype)

    @property
    def nbytes(self) -> int:
        """Of these rows in the files."""
        return sum(part.nbytes for part in self.pages())

    @abstractmethod
    def get_dtype(self) -> str:
        """How it is stored, in words, which are none of safetensors' dtypes."""

    @abstractmethod
    def read(self, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Multiplied out on a device."""

    @property
    @abstractmethod
    def four_bit(self) -> str | None:
        """What it can be kept as, as `FourBit.name` says; None where it has to be multiplied out."""

    @abstractmethod
    def codes(self, device: Any = "cpu") -> tuple[Tensor, Tensor]:
        """Codes of four bits, uint8 [..., O, I], and scales [..., O, I/G], as `FourBit` has them."""

    @abstractmethod
    def pages(self) -> Iterator[Tensor]:
        """What it is made of as it lies in the files, for who fetches them beforehand."""

    @abstractmethod
    def _of(self, first: int, last: int) -> Self: ...


class PackedSlice(Unread):
    """Rows of a packed weight.

    Args:
        parts: slices of safetensors, or what else gives a mapped tensor by `[...]`, by the key of the files.
    """

    def __init__(self, packed: Packed, parts: Mapping[str, Any], rows: tuple[int, int] | None = None) -> None:
        super().__init__(packed.shape, rows)
        self.packed, self._slices = packed, parts

    @property
    def nbytes(self) -> int:
        """As the headers say where these are all rows."""
        is_all = (self._first, self._last) == (0, self._whole[0])
        return self.packed.bytes if is_all and self.packed.bytes else super().nbytes

    def get_dtype(self) -> str:
        """The format in words."""
        return self.packed.stored

    def read(self, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Block by block where it is large."""
        step, width = self.packed.step, math.prod(self._whole[1:])
        many = max(1, _BLOCK // max(1, width * step)) * step
        blocks = range(self._first // step * step, self._last, many)
        if len(blocks) == 1:
            return self._rows(blocks[0], many, device).to(dtype)
        result = torch.empty(self.shape, dtype=dtype, device=device)
        for begin in blocks:
            rows = self._rows(begin, many, device)
            at = max(begin, self._first) - self._first
            result[at : at + len(rows)] = rows
        return result

    @property
    def four_bit(self) -> str | None:
        """As its format says."""
        return None if self.packed.four_bit is None else self.packed.four_bit.name

    def codes(self, device: Any = "cpu") -> tuple[Tensor, Tensor]:
        """All rows at once."""
        assert self.packed.four_bit is not None
        begin = self._first // self.packed.step * self.packed.step
        end = min(-(-self._last // self.packed.step) * self.packed.step, self._whole[0])
        parts = {name: part.to(device) for name, part in self._parts(begin, end)}
        rows = slice(self._first - begin, self._last - begin)
        codes, scales = self.packed.four_bit.codes(parts)
        return codes[rows], scales[rows]

    def blocks(self) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """A few rows after the others: from, to, and their parts as they lie in the files; these rows and no other.

        Raises:
            ValueError: other rows share their parts with the first or the last one.
        """
        step, ends = self.packed.step, (self._first, self._last)
        if any(end % step and end != self._whole[0] for end in ends):
            raise ValueError(f"rows {self._first} to {self._last} cannot be taken by themselves")
        many = max(1, _BLOCK // max(1, math.prod(self._whole[1:]) * step)) * step
        for begin in range(*ends, many):
            end = min(begin + many, self._last)
            yield begin, end, dict(self._parts(begin, end))

    def pages(self) -> Iterator[Tensor]:
        """Of its parts."""
        return (part for _, part in self._parts(self._first // self.packed.step * self.packed.step, self._last))

    def _of(self, first: int, last: int) -> Self:
        return type(self)(self.packed, self._slices, (first, last))

    def _rows(self, begin: int, many: int, device: Any) -> Tensor:
        """Those rows of a block, which begins at a multiple of `step`, that are wanted here."""
        end = min(begin + many, self._whole[0])
        parts = {name: part.to(device) for name, part in self._parts(begin, end)}
        return self.packed.unpack(parts)[max(0, self._first - begin) : self._last - begin]

    def _parts(self, begin: int, end: int) -> Iterator[tuple[str, Tensor]]:
        for name, axis, first, last in self.packed.spans(begin, end):
            tensor = self._slices[self.packed.parts[name].key][...]
            if axis is not None and (first or last < tensor.shape[axis]):
                tensor = tensor.narrow(axis, first, min(last, tensor.shape[axis]) - first)
            yield name, tensor


class StackSlice(Unread):
    """Experts of a stack that the files hold apart: each as one tensor, or as its gate and its up projection.

    Args:
        experts: of each expert its pieces, slices [O, I], or [1, O, I] where they are one of a stack.
        is_bias: pieces are [O], or [1, O].
        is_concatenated: pieces one after the other along the outputs; otherwise their outputs by turns.
        is_transposed: the stack is [E, I, O].
    """

    def __init__(
        self,
        experts: Sequence[Sequence[Any]],
        *,
        is_concatenated: bool = True,
        is_transposed: bool = False,
        is_bias: bool = False,
        rows: tuple[int, int] | None = None,
    ) -> None:
        self._experts, self._is_concatenated, self._is_transposed = experts, is_concatenated, is_transposed
        self._dim = 1 if is_bias else 2
        pieces = [tuple(piece.get_shape())[-self._dim :] for piece in experts[0]]
        outputs, inputs = sum(piece[0] for piece in pieces), pieces[0][1:]
        size = (*inputs, outputs) if is_transposed else (outputs, *inputs)
        super().__init__((len(experts), *size), rows)

    def get_dtype(self) -> str:
        """Of its first piece."""
        return str(self._experts[self._first][0].get_dtype())

    def read(self, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Expert by expert."""
        made = [self._joined(self._experts[number], device, dtype) for number in range(self._first, self._last)]
        return made[0][None] if len(made) == 1 else torch.stack(made)

    @property
    def four_bit(self) -> str | None:
        """Where all pieces agree on it."""
        pieces = [piece for expert in self._experts[self._first : self._last] for piece in expert]
        kinds = {piece.four_bit if isinstance(piece, Unread) else None for piece in pieces}
        return kinds.pop() if len(kinds) == 1 else None

    def codes(self, device: Any = "cpu") -> tuple[Tensor, Tensor]:
        """Expert by expert."""
        made = [self._joined_codes(self._experts[number], device) for number in range(self._first, self._last)]
        codes, scales = zip(*made, strict=True)
        return torch.stack(codes), torch.stack(scales)

    def _joined_codes(self, pieces: Sequence[Any], device: Any) -> tuple[Tensor, Tensor]:
        found = [[part[0] if part.dim() == 3 else part for part in piece.codes(device)] for piece in pieces]
        codes, scales = ([piece[side] for piece in found] for side in (0, 1))
        return self._in_turn(codes), self._in_turn(scales)

    def _in_turn(self, read: list[Tensor]) -> Tensor:
        if len(read) == 1:
            return read[0]
        return torch.cat(read) if self._is_concatenated else torch.stack(read, 1).flatten(0, 1)

    def pieces(self, expert: int) -> Sequence[Any]:
        """Of one expert, unread."""
        return self._experts[expert]

    def taken_apart(self, expert: int, matrix: Tensor) -> list[tuple[Any, Tensor]]:
        """One expert's pieces, and what each of them holds of a matrix [O, I] that stands for the whole expert."""
        pieces = self._experts[expert]
        if not self._is_concatenated:
            return [(piece, matrix[number :: len(pieces)]) for number, piece in enumerate(pieces)]
        sizes = [piece.get_shape()[-2] for piece in pieces]
        return list(zip(pieces, matrix.split(sizes), strict=True))

    def pages(self) -> Iterator[Tensor]:
        """Of its pieces."""
        for expert in self._experts[self._first : self._last]:
            for piece in expert:
                yield from piece.pages() if isinstance(piece, Unread) else (piece[...],)

    def _of(self, first: int, last: int) -> Self:
        return type(self)(
            self._experts,
            is_concatenated=self._is_concatenated,
            is_transposed=self._is_transposed,
            is_bias=self._dim == 1,
            rows=(first, last),
        )

    def _joined(self, pieces: Iterable[Any], device: Any, dtype: torch.dtype) -> Tensor:
        read: list[Tensor] = [piece[...].to(device=device, dtype=dtype) for piece in pieces]
        read = [tensor[0] if tensor.dim() > self._dim else tensor for tensor in read]
        joined = self._in_turn(read)
        return joined.T if self._is_transposed and joined.dim() == 2 else joined


def unread(plain: Any, key: str = "") -> Unread:
    """A slice of safetensors whose rows can be taken without reading them; one that can already is as it is, and so is
    a single number, which has none.

    Args:
        key: what its tensor is called in the files, for who asks later.
    """
    if isinstance(plain, Unread) or not plain.get_shape():
        return cast("Unread", plain)
    whole = Packed(key, tuple(plain.get_shape()), {"": Part(key)}, lambda parts: parts[""], plain.get_dtype(), 0)
    return PackedSlice(whole, {key: plain})
