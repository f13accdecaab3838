"""Products of fp32 rows with int8 weights on a CPU's integer units: as accurate as in fp32, and faster.

A row is written in three digits to the base 256 beside its largest number, 24 bits in all. What a digit's product with
the weights gives is a whole number, exact in int32, and units for such products are four times as fast as those for
fp32; the weights are read as they are stored. The three are put together in fp32. Splitting so is known as the Ozaki
scheme (Ootomo, Ozaki, Yokota: DGEMM on integer matrix multiplication unit, 2024); no library has it for int8 weights.

    N rows, I inputs, O outputs, P and Q sides of a weight as it is stored
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["SplitRows", "Stored", "can_multiply", "multiply", "multiply_each"]

_DIGITS = 3
_BITS = 8
_BASE = 1 << _BITS
_HALVES = sum(_BASE // 2 * _BASE**place for place in range(_DIGITS))
_LARGEST = 127 * _BASE ** (_DIGITS - 1)
"""What a row's largest number becomes: 127 in the highest digit, so that rounding it up cannot be too much."""
_SMALLEST = 1e-30
"""A row of nothing larger counts as if this were its largest number: the inverse of a smaller one is infinite."""
_MOST_INPUTS = (2**31 - 1) // (128 * 128)
"""Beyond so many a sum of products might not fit into int32."""
_FEWEST_WEIGHTS, _FEWEST_FOR_FEW_ROWS = 1 << 19, 1 << 17
"""With fewer, splitting the rows costs more than whole numbers save. Few rows are split fast, and a weight is not worth
converting for them."""
_FEW_ROWS, _A_ROW_OR_TWO = 16, 2
_ROWS = 256
_COLUMNS, _SUMS = 512, 1 << 19
"""About so many rows are computed at a time, and columns: that many at least, and so many of both that a thread's sums,
at most some megabytes, stay in the cache that cores share."""
_AT_ONCE = 1 << 18
"""About so many numbers are split into digits at a time."""
_PROBE = 64


def can_multiply(x: torch.Tensor, stored: torch.Tensor, sides: tuple[int, ...] | None = None) -> bool:
    """Whether `multiply` takes these, where that pays: with this weight (or stack of such), on this machine.

    `sides` of a weight, where they are not those of the bytes that it is stored in.
    """
    sides = sides or stored.shape[-2:]
    return (
        x.dtype == torch.float32
        and stored.dtype == torch.int8
        and stored.is_cpu
        and not isinstance(x, FakeTensor)
        and max(sides) <= _MOST_INPUTS
        and prod(sides) >= (_FEWEST_FOR_FEW_ROWS if x.shape[:-1].numel() <= _FEW_ROWS else _FEWEST_WEIGHTS)
        and _has_integer_units()
    )


def multiply(x_NI: torch.Tensor, stored_PQ: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """x times an int8 weight, or times its transpose: [N, O] in fp32. Of each row the error is at most 2⁻²³ of its
    largest number times the sum of the weights' magnitudes, and that of adding the digits' products in fp32."""
    if 0 < x_NI.shape[0] <= _A_ROW_OR_TWO:
        return _multiply_at_once(x_NI, stored_PQ.t() if transposed else stored_PQ)
    width = stored_PQ.shape[0 if transposed else 1]
    return multiply_each(x_NI, [(slice(0, x_NI.shape[0]), stored_PQ)], width, transposed=transposed)


def _multiply_at_once(x_NI: torch.Tensor, stored_IO: torch.Tensor) -> torch.Tensor:
    """In as few calls as it takes: of a row or two they are what costs."""
    rows, inputs = x_NI.shape
    largest_N1 = torch.linalg.vector_norm(x_NI, math.inf, 1, True).clamp_min_(_SMALLEST)
    whole = torch.mul(x_NI, _LARGEST / largest_N1).round_().to(torch.int32)
    # Each byte is a digit once half the base is added to all of them and their highest bits are turned round.
    digits = whole.add_(_HALVES).bitwise_xor_(_HALVES).view(torch.int8).view(rows, inputs, 4).transpose(1, 2)
    flat = digits[:, :_DIGITS].reshape(_DIGITS * rows, inputs)
    sums = torch._int_mm(flat, stored_IO).view(rows, _DIGITS, -1).to(torch.float32)
    out_NO, *others = reversed(sums.unbind(1))
    for each in others:
        out_NO = torch.add(each, out_NO, alpha=_BASE)
    return out_NO.mul_(largest_N1 * (1.0 / _LARGEST))


@dataclass(frozen=True)
class SplitRows:
    """Rows as digits [N, 3, I], the highest first, and what the lowest one is worth, [N, 1]."""

    digits: torch.Tensor
    unit_N1: torch.Tensor

    @classmethod
    def of(cls, x_NI: torch.Tensor) -> SplitRows:
        """Of rows that several products take."""
        rows, inputs = x_NI.shape
        whole = cls(x_NI.new_empty(rows, _DIGITS, inputs, dtype=torch.int8), x_NI.new_empty(rows, 1))
        _write_digits(x_NI, whole.digits, whole.unit_N1)
        return whole

    def gather(self, index_N: torch.Tensor) -> SplitRows:
        """Those rows."""
        return SplitRows(self.digits.index_select(0, index_N), self.unit_N1.index_select(0, index_N))


Stored = torch.Tensor | Callable[[], torch.Tensor]
"""A weight, or what brings it into memory that the thread's next one takes: then it is multiplied in one piece."""


def multiply_each(
    x_NI: torch.Tensor | SplitRows, parts: Sequence[tuple[slice, Stored]], width: int, *, transposed: bool
) -> torch.Tensor:
    """The same of rows that have a weight of their own each: `parts` are runs of them, one after the other."""
    known = x_NI if isinstance(x_NI, SplitRows) else None
    like = x_NI.unit_N1 if isinstance(x_NI, SplitRows) else x_NI
    result = like.new_empty(like.shape[0], width)
    for (start, stop), pieces in _chunks(parts):
        if known:
            digits, unit_N1 = _between(known.digits, 0, start, stop), _between(known.unit_N1, 0, start, stop)
        else:
            digits, unit_N1 = _digits(_between(like, 0, start, stop))
        rows, _, inputs = digits.shape
        flat, out = digits.view(_DIGITS * rows, inputs), _between(result, 0, start, stop)
        is_brought = any(callable(stored) for *_, stored in pieces)
        step = width if is_brought else _even(width, max(_COLUMNS, _SUMS // rows))
        for first in range(0, width, step):
            last = min(first + step, width)
            sums = _room("sums", (_DIGITS * rows, last - first), torch.int32)
            for begin, end, stored in pieces:
                stored_PQ = stored() if callable(stored) else stored
                weight_PQ = _between(stored_PQ, 0 if transposed else 1, first, last)
                torch._int_mm(
                    _between(flat, 0, _DIGITS * begin, _DIGITS * end),
                    weight_PQ.t() if transposed else weight_PQ,
                    out=_between(sums, 0, _DIGITS * begin, _DIGITS * end),
                )
            _put_together(sums.view(rows, _DIGITS, last - first), unit_N1, _between(out, 1, first, last))
    return result


def _between(tensor: torch.Tensor, side: int, first: int, last: int) -> torch.Tensor:
    """A part along one side: at the sizes of a block of rows each view counts, so none is made of the whole."""
    return tensor if last - first == tensor.shape[side] else tensor.narrow(side, first, last - first)


Pieces = list[tuple[int, int, Stored]]


def _chunks(parts: Sequence[tuple[slice, Stored]]) -> Iterator[tuple[tuple[int, int], Pieces]]:
    """Rows that are computed at a time, first and last, and within them those of each weight."""
    start = stop = 0
    pieces: Pieces = []
    for rows, stored in parts:
        step = _even(rows.stop - rows.start, _ROWS)
        for first in range(rows.start, rows.stop, step):
            last = min(first + step, rows.stop)
            if pieces and last - start > _ROWS:
                yield (start, stop), pieces
                start, pieces = stop, []
            pieces.append((first - start, last - start, stored))
            stop = last
    if pieces:
        yield (start, stop), pieces


def _even(count: int, about: int) -> int:
    """The length of equal parts, each about so long: the few that a full part leaves over would cost much more each."""
    return max(1, -(-count // max(1, round(count / about))))


def _digits(x_NI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `SplitRows`, in memory that the thread's next call overwrites."""
    rows, inputs = x_NI.shape
    digits, unit_N1 = _room("digits", (rows, _DIGITS, inputs), torch.int8), x_NI.new_empty(rows, 1)
    _write_digits(x_NI, digits, unit_N1)
    return digits, unit_N1


def _write_digits(x_NI: torch.Tensor, digits: torch.Tensor, unit_N1: torch.Tensor) -> None:
    rows, inputs = x_NI.shape
    step = _even(rows, max(1, _AT_ONCE // inputs))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        _write_some(*(_between(each, 0, first, last) for each in (x_NI, digits, unit_N1)))


def _write_some(x_NI: torch.Tensor, digits: torch.Tensor, unit_N1: torch.Tensor) -> None:
    scaled = torch.abs(x_NI, out=_room("scaled", x_NI.shape, torch.float32))
    # Infinity and NaN go through the unit, whatever the digits are.
    largest_N1 = scaled.amax(1, keepdim=True).clamp_min_(_SMALLEST)
    torch.mul(x_NI, _LARGEST / largest_N1, out=scaled)
    whole = _room("whole", x_NI.shape, torch.int32).copy_(scaled.round_())
    for place in reversed(range(_DIGITS)):
        digits[:, place].copy_(whole)  # the lowest byte, with its sign
        if place:
            whole.add_(_BASE // 2).bitwise_right_shift_(_BITS)
    torch.mul(largest_N1, 1.0 / _LARGEST, out=unit_N1)


def _put_together(sums: torch.Tensor, unit_N1: torch.Tensor, out_NO: torch.Tensor) -> None:
    """From the digits' products [N, 3, O], which are overwritten."""
    first, *others = sums.view(torch.float32).copy_(sums).unbind(1)
    for each in others:
        first = torch.add(each, first, alpha=_BASE, out=out_NO)
    out_NO.mul_(unit_N1)


_kept = threading.local()


def _room(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory that the thread's next call overwrites: the same, warm, every time."""
    elements, strides = _layout(shape)
    room: torch.Tensor | None = getattr(_kept, name, None)
    if room is None or room.shape[0] < elements:
        with torch.inference_mode(False):
            room = torch.empty(elements, dtype=dtype)
        setattr(_kept, name, room)
    return room.as_strided(shape, strides)


@lru_cache(1 << 12)
def _layout(shape: tuple[int, ...]) -> tuple[int, list[int]]:
    """How many numbers a tensor in one piece has, and its strides."""
    return prod(shape), [prod(shape[side + 1 :]) for side in range(len(shape))]


@cache
def _has_integer_units() -> bool:
    """Whether this machine has instructions for int8 products, and torch's use of them is exact on the largest numbers:
    older ones saturate on the way."""
    if not torch.cpu._is_vnni_supported():
        return False
    rows = torch.full((_PROBE, _PROBE), 127, dtype=torch.int8)
    rows[1::2] = -128
    found = torch._int_mm(rows, rows.t())
    return bool(torch.equal(found.long(), rows.long() @ rows.long().t()))
