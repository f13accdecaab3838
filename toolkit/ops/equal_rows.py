"""Which rows are computed together where a block has as many of each of its experts: what batched products take.

Experts with the most rows come first, in groups. A group's blocks lie on one another like bricks, in a few heights: the
lowest has all of its experts, the next one the first of them, those that have more. So hardly a row is padding.

    T tokens, K experts per token, N rows of a block, padded, G experts of it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from toolkit.ops.rows import Routing, RowBlock, is_fake, rows_of_each

__all__ = ["EqualBlock", "EqualRouting"]

_WORTH_A_BLOCK = 1 / 10
"""Share of the rows that a further height has to save: a block takes about as long as so many rows."""
_MULTIPLE = 4
_MOST_ROWS = 4096
"""About so many are computed at a time, which bounds what is held beside the input."""


@dataclass(frozen=True)
class EqualBlock(RowBlock):
    """Rows of the first G experts of a group; padding repeats an expert's last one. Both are among the routing's."""

    group: slice
    experts: slice

    def batch(self, rows_NI: torch.Tensor) -> torch.Tensor:
        """[G, N / G, I]."""
        return rows_NI.view(self.experts.stop - self.experts.start, -1, rows_NI.shape[-1])


class EqualRouting(Routing):
    """Rows sorted by block and expert.

    Args:
        index_TK: expert numbers; from `num_experts` on they mean that no expert here computes the row.
        most_experts: of a group.
    """

    experts: torch.Tensor
    """Those that are hit, in the order in which blocks have them."""

    def __init__(self, index_TK: torch.Tensor, num_experts: int, most_experts: int) -> None:
        device, by_expert_S = index_TK.device, index_TK.flatten().argsort(stable=True)
        counts = rows_of_each(index_TK, num_experts)
        starts = [0, *accumulate(counts)]
        hit = sorted((expert for expert, count in enumerate(counts) if count), key=lambda expert: -counts[expert])
        self.experts = torch.tensor(hit, dtype=torch.long, device=device)
        self.is_fake, self.is_shared_out, self.idle = is_fake(index_TK), False, []
        self.blocks, orders, done = [], [], 0
        for group in (slice(first, first + most_experts) for first in range(0, len(hit), most_experts)):
            for low, high in _heights([counts[expert] for expert in hit[group]]):
                mine = [expert for expert in hit[group] if counts[expert] > low]
                sizes = [min(counts[expert], high) - low for expert in mine]
                place_N, real = _places([starts[expert] + low for expert in mine], sizes, high - low, device)
                row_N, rows = by_expert_S[place_N], slice(done, done + sum(sizes))
                experts = slice(group.start, group.start + len(mine))
                block = EqualBlock(rows, row_N // index_TK.shape[1], real, (), group, experts)
                self.blocks.append(block)
                orders.append(block.strip(row_N))
                done = rows.stop
        self._order = torch.cat([*orders, by_expert_S[done:]])


def _heights(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """From which to which of an expert's rows each block has them. `counts`: of the experts, the largest first."""
    low = 0
    for top in _tops(counts[::-1]):
        experts = sum(count > low for count in counts)
        parts = -(-(top - low) * experts // _MOST_ROWS)
        step = -(-(top - low) // (parts * _MULTIPLE)) * _MULTIPLE
        for first in range(low, top, step):
            yield first, min(first + step, top)
        low = top


def _tops(ascending: Sequence[int]) -> list[int]:
    """Numbers of rows at which blocks end: one more as long as it saves enough padding."""
    ends = [0, len(ascending)]
    while True:
        saved, end = max(
            ((ascending[stop - 1] - ascending[at - 1]) * (at - start), at)
            for start, stop in pairwise(ends)
            for at in range(start + 1, stop + 1)
        )
        if saved <= _WORTH_A_BLOCK * sum(ascending):
            return sorted({-(-ascending[stop - 1] // _MULTIPLE) * _MULTIPLE for stop in ends[1:]})
        ends = sorted([*ends, end])


def _places(
    starts: list[int], sizes: list[int], height: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | slice]:
    """Places of a block's rows among all sorted by expert [N], and which of the N are real."""
    first_G1, size_G1 = (torch.tensor(each, device=device).unsqueeze(1) for each in (starts, sizes))
    offset = torch.arange(height, device=device)
    place_N = (first_G1 + torch.minimum(offset, size_G1 - 1)).flatten()
    count = sum(sizes)
    if count == len(place_N):
        return place_N, slice(0, count)
    size = size_G1.flatten()
    padding_before = torch.arange(len(sizes), device=device) * height - (size.cumsum(0) - size)
    return place_N, torch.arange(count, device=device) + padding_before.repeat_interleave(size, output_size=count)
