"""Which rows are computed together: the routing sorted by expert, in blocks of bounded size.

A block is a run of experts with few rows each, or a part of one with many: what is done number by number is done for
all of a block at once. The rows are never sorted into a copy of all; a block gathers its own when its turn comes.

    T tokens, K experts per token, N rows of a block, padded, H hidden
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Routing", "RowBlock", "Segment", "is_fake", "rows_of_each"]

_BUSY = 2
"""How many times its even share a busy expert is taken to have, where there are no numbers to route by."""
_MULTIPLE = 4
"""BLAS takes as long for 33 rows as for 36, and gets ready once for each number that it meets. Fewer are taken as they
are. How a row is rounded depends, by processor, on their number and on its place: no padding mends that everywhere."""
_TOGETHER = 256
"""Rows up to which experts are put together: enough for the calls not to count, and no more than a cache holds."""
_TASKS = 16
"""Blocks there should be at least, so that all cores have work until the end."""


@dataclass(frozen=True)
class Segment:
    """Rows of one expert within a block, padding at their end included."""

    expert: int
    rows: slice
    is_first: bool
    is_only: bool
    """Whether it has the expert's first rows, and all of them."""

    def of(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Its part of the block's rows; no view is made where that is all of them, since each one counts."""
        first, size = self.rows.start, self.rows.stop - self.rows.start
        return rows_N if size == rows_N.shape[0] else rows_N.narrow(0, first, size)


@dataclass(frozen=True)
class RowBlock:
    """Real rows' place among all rows sorted by expert, each padded row's token [N], and where the real ones are."""

    rows: slice
    token: torch.Tensor
    real: torch.Tensor | slice
    """Among the N; those of a single expert come first."""
    segments: tuple[Segment, ...]

    def is_within(self, first_rows: torch.Tensor) -> bool:
        """Whether these, the first of all rows, have all of the block's."""
        return int(self.rows.stop) <= first_rows.shape[0]

    def gather(self, source_TH: torch.Tensor) -> torch.Tensor:
        """[N, H]; padding rows repeat their expert's first one."""
        return source_TH.index_select(0, self.token)

    def strip(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """The real rows."""
        if self.rows.stop - self.rows.start == rows_NH.shape[0]:
            return rows_NH
        return rows_NH[self.real] if isinstance(self.real, slice) else rows_NH.index_select(0, self.real)

    def pad(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """The block's real rows, zero ones between them up to N."""
        if rows_NH.shape[0] == self.token.shape[0]:
            return rows_NH
        places, count = self.token.shape[0], rows_NH.shape[0]
        if isinstance(self.real, slice):  # then they come first
            padded = rows_NH.new_empty(places, *rows_NH.shape[1:])
            padded.narrow(0, 0, count).copy_(rows_NH)
            padded.narrow(0, count, places - count).zero_()
        else:
            padded = rows_NH.new_zeros(places, *rows_NH.shape[1:])
            padded[self.real] = rows_NH
        return padded

    def scatter_add(self, target_TH: torch.Tensor, rows_NH: torch.Tensor) -> None:
        """Add the real rows to their tokens; where a token has several, in the order of its experts."""
        target_TH.index_add_(0, self.strip(self.token), self.strip(rows_NH).to(target_TH.dtype))


class Routing:
    """Rows sorted by expert, tokens ascending in each, in blocks; experts nobody chose have none.

    Args:
        index_TK: expert numbers; from `num_experts` on they mean that no expert here computes the row.
        most_rows: of one block.
    """

    def __init__(self, index_TK: torch.Tensor, num_experts: int, most_rows: int) -> None:
        self.is_fake = is_fake(index_TK)
        """No numbers: blocks stand for any routing, and threads must not leave the fake mode."""
        self.is_shared_out = True
        """Whether threads take a block each; else all take each product."""
        self._order = index_TK.flatten().argsort(stable=True)
        token = self._order // index_TK.shape[1]
        counts = _fake_counts(index_TK, num_experts) if self.is_fake else rows_of_each(index_TK, num_experts)
        self.idle = [expert for expert, count in enumerate(counts) if not count]
        """Experts that nobody chose."""
        self.blocks = list(_blocks(counts, token, most_rows))

    @classmethod
    def in_one_block(cls, index_TK: torch.Tensor, num_experts: int) -> Routing:
        """Few rows without gradients, not padded: a block of all of them."""
        self = cls.__new__(cls)
        flat, slots = index_TK.flatten().tolist(), index_TK.shape[1]
        order = sorted((row for row, expert in enumerate(flat) if expert < num_experts), key=flat.__getitem__)
        starts = [at for at, row in enumerate(order) if at == 0 or flat[row] != flat[order[at - 1]]]
        segments = tuple(
            Segment(flat[order[start]], slice(start, stop), is_first=True, is_only=True)
            for start, stop in itertools.pairwise([*starts, len(order)])
        )
        self.is_fake, self.is_shared_out, self._order = False, False, torch.tensor(order, dtype=torch.long)
        self.idle = []
        every = slice(0, len(order))
        self.blocks = [RowBlock(every, self._order // slots, every, segments)] if order else []
        return self

    def sort(self, values_TK: torch.Tensor) -> torch.Tensor:
        """A value a row, sorted by expert, [S]."""
        return values_TK.flatten()[self._order]

    def unsort(self, values_S: torch.Tensor, like_TK: torch.Tensor) -> torch.Tensor:
        """The inverse of `sort`."""
        return torch.empty_like(like_TK).flatten().index_copy_(0, self._order, values_S).view_as(like_TK)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it has a shape and no numbers (`FakeTensorMode`): the plan rehearses a step that way to count bytes."""
    return isinstance(tensor, FakeTensor)


def rows_of_each(index_TK: torch.Tensor, num_experts: int) -> list[int]:
    """How many rows each expert has; as many as any other where there are no numbers."""
    if is_fake(index_TK):
        rows = index_TK.numel()
        return [rows * (expert + 1) // num_experts - rows * expert // num_experts for expert in range(num_experts)]
    counts: list[int] = torch.bincount(index_TK.flatten(), minlength=num_experts)[:num_experts].tolist()
    return counts


def _fake_counts(index_TK: torch.Tensor, num_experts: int) -> list[int]:
    """Rows of as many busy experts as fill two blocks: what all of them hold at once, blocks being let go one after the
    other, is no more."""
    tokens, slots = index_TK.shape
    busy = max(1, min(tokens, _BUSY * tokens * slots // num_experts))
    counts: list[int] = []
    left = tokens * slots
    while left and len(counts) < num_experts and (len(counts) < 2 or sum(counts) < 2 * _TOGETHER):
        counts.append(min(busy, left))
        left -= counts[-1]
    return counts


def _padded(count: int) -> int:
    return count if count < _MULTIPLE else -(-count // _MULTIPLE) * _MULTIPLE


def _blocks(counts: list[int], token_S: torch.Tensor, most_rows: int) -> Iterator[RowBlock]:
    """Pieces of at most so many rows, put together where they are small."""
    pieces = [
        (expert, first, min(most_rows, count - first), count)
        for expert, count in enumerate(counts)
        for first in range(0, count, most_rows)
    ]
    if not pieces:
        return
    sizes, padded = [piece[2] for piece in pieces], [_padded(piece[2]) for piece in pieces]
    token, real = _places(token_S, sizes, padded)
    together = min(_TOGETHER, most_rows, len(token_S) // _TASKS)
    start = first_row = first_place = 0
    while start < len(pieces):
        stop, places = start + 1, padded[start]
        while stop < len(pieces) and places + padded[stop] <= together:
            places += padded[stop]
            stop += 1
        rows = sum(sizes[start:stop])
        segments, at = [], 0
        for (expert, first, _, count), size in zip(pieces[start:stop], padded[start:stop], strict=True):
            segments.append(Segment(expert, slice(at, at + size), first == 0, count <= most_rows))
            at += size
        mine = slice(first_row, first_row + rows)
        yield RowBlock(
            mine,
            token[first_place : first_place + places],
            slice(0, rows) if rows == places or stop == start + 1 else real[mine] - first_place,
            tuple(segments),
        )
        start, first_row, first_place = stop, first_row + rows, first_place + places


def _places(token_S: torch.Tensor, sizes: list[int], padded: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of all pieces one after the other with their padding, and where among these the real rows are."""
    device = token_S.device
    size, room = (torch.tensor(each, device=device) for each in (sizes, padded))
    first, first_padded = size.cumsum(0) - size, room.cumsum(0) - room
    piece = torch.arange(len(sizes), device=device).repeat_interleave(room, output_size=sum(padded))
    offset = torch.arange(sum(padded), device=device) - first_padded[piece]
    row = first[piece] + torch.where(offset < size[piece], offset, 0)
    shift = (first_padded - first).repeat_interleave(size, output_size=sum(sizes))
    return token_S[row], torch.arange(sum(sizes), device=device) + shift
