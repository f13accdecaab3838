"""Which rows each expert computes: the routing sorted by expert, in blocks of bounded size.

The rows themselves are never sorted into a copy; a block gathers its own when its turn comes.

    T tokens, K experts per token, N rows of a block, H hidden
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Routing", "RowBlock", "is_imagined"]

_FEWEST_ROWS = 16
"""BLAS picks other kernels for a few rows, and then a row's bits depend on how many neighbours it has. Padding to this
many makes a token's output the same, bit for bit, whatever else is in the batch."""
_BUSY = 2
"""How many times its even share a busy expert is taken to have, where there are no numbers to route by."""
_MULTIPLE = 4
"""BLAS takes as long for 33 rows as for 36."""


@dataclass(frozen=True)
class RowBlock:
    """Rows of one expert: their place among all rows sorted by expert, and each one's token, padded, [N]."""

    expert: int
    rows: slice
    token: torch.Tensor
    is_first: bool
    is_only: bool
    """Whether it is its expert's first block, and the only one."""

    @property
    def count(self) -> int:
        """Real rows."""
        return int(self.rows.stop) - int(self.rows.start)

    def gather(self, source_TH: torch.Tensor) -> torch.Tensor:
        """[N, H]; padding rows repeat the first one."""
        return source_TH.index_select(0, self.token)

    def pad(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """The block's real rows, zero ones below them up to N."""
        short = self.token.shape[0] - rows_NH.shape[0]
        return torch.cat([rows_NH, rows_NH.new_zeros(short, *rows_NH.shape[1:])]) if short else rows_NH

    def scatter_add(self, target_TH: torch.Tensor, rows_NH: torch.Tensor) -> None:
        """Add the real rows to their tokens, which are all different."""
        target_TH.index_add_(0, self.token[: self.count], rows_NH[: self.count].to(target_TH.dtype))


class Routing:
    """Rows sorted by expert, tokens ascending in each, in blocks; experts nobody chose have none.

    Args:
        index_TK: expert numbers; from `num_experts` on they mean that no expert here computes the row.
        most_rows: of one block.
    """

    def __init__(self, index_TK: torch.Tensor, num_experts: int, most_rows: int) -> None:
        flat = index_TK.flatten()
        self.is_imagined = is_imagined(index_TK)
        """No numbers: blocks stand for any routing, and threads must not leave the mode that imagines."""
        self._order = flat.argsort(stable=True)
        token = self._order // index_TK.shape[1]
        counts = _imagined_counts(index_TK, num_experts) if self.is_imagined else _counts(flat, num_experts)
        self.idle = [expert for expert, count in enumerate(counts) if not count]
        """Experts that nobody chose."""
        self.blocks: list[RowBlock] = []
        start = 0
        for expert, count in enumerate(counts):
            for first in range(start, start + count, most_rows):
                rows = slice(first, min(first + most_rows, start + count))
                self.blocks.append(RowBlock(expert, rows, _padded(token[rows]), first == start, count <= most_rows))
            start += count

    def sort(self, values_TK: torch.Tensor) -> torch.Tensor:
        """A value a row, sorted by expert, [S]."""
        return values_TK.flatten()[self._order]

    def unsort(self, values_S: torch.Tensor, like_TK: torch.Tensor) -> torch.Tensor:
        """The inverse of `sort`."""
        return torch.empty_like(like_TK).flatten().index_copy_(0, self._order, values_S).view_as(like_TK)


def is_imagined(tensor: torch.Tensor) -> bool:
    """Whether it has a shape and no numbers (`FakeTensorMode`): the plan rehearses a step that way to count bytes."""
    return isinstance(tensor, FakeTensor)


def _counts(flat_S: torch.Tensor, num_experts: int) -> list[int]:
    counts: list[int] = torch.bincount(flat_S, minlength=num_experts)[:num_experts].tolist()
    return counts


def _imagined_counts(index_TK: torch.Tensor, num_experts: int) -> list[int]:
    """Rows of two busy experts: what all of them hold at once, blocks being let go one after the other, is no more."""
    tokens, slots = index_TK.shape
    busy = max(1, min(tokens, _BUSY * tokens * slots // num_experts))
    return [busy, min(busy, tokens * slots - busy)][: min(2, num_experts)]


def _padded(token_N: torch.Tensor) -> torch.Tensor:
    count = token_N.shape[0]
    short = max(_FEWEST_ROWS, -(-count // _MULTIPLE) * _MULTIPLE) - count
    return torch.cat([token_N, token_N[:1].expand(short)]) if short else token_N
