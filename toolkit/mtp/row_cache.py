"""A cache whose rows are as long as they are: what is short has padding on the left, whatever was taken back.

transformers' caches drop the last tokens of all rows alike, and of several sequences with drafts each keeps another
number. Here a row that keeps fewer is first moved to the right, so that all end in one column, as `generate` has them.

    B rows, C columns, L new tokens
"""

from __future__ import annotations

import torch
from transformers import Cache

__all__ = ["RowCache", "shifted"]


class RowCache:
    """Keys and values of `count` rows; `lengths_B` are the tokens that stand in each."""

    def __init__(self, cache: Cache, count: int, device: torch.device) -> None:
        self.cache, self.lengths_B = cache, torch.zeros(count, dtype=torch.long, device=device)

    def reading(self, columns: int, counts_B: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Who is seen and where the new tokens stand, when so many columns are read next.

        Args:
            counts_B: how many of them are tokens, where the first ones may be padding; without it all.

        Returns:
            1 for tokens, 0 for padding [B, C + columns], and places in the sequences [B, columns], 0 for padding.
        """
        total = int(self.cache.get_seq_length()) + columns
        self.lengths_B = self.lengths_B + (columns if counts_B is None else counts_B)
        steps = torch.arange(total, device=self.lengths_B.device)
        places = self.lengths_B[:, None] - total + steps
        return (places >= 0).long(), places[:, total - columns :].clamp(min=0)

    def pick(self, rows: torch.Tensor) -> None:
        """Go on with these rows, in this order; one may be there several times."""
        self.cache.reorder_cache(rows)
        self.lengths_B = self.lengths_B[rows]

    def take_back(self, counts_B: torch.Tensor) -> None:
        """Drop so many of the last tokens of each row."""
        least = int(counts_B.min())
        if int((counts_B - least).max()):
            for layer in self.cache.layers:
                if getattr(layer, "keys", None) is not None:
                    layer.keys, layer.values = (shifted(x, counts_B - least, 2) for x in (layer.keys, layer.values))
        self.cache.crop(-least)
        self.lengths_B = self.lengths_B - counts_B


def shifted(x: torch.Tensor, by_B: torch.Tensor, dim: int) -> torch.Tensor:
    """x [B, …] with each row moved to the right along `dim` by its number; what comes in on the left is of no use."""
    size = x.shape[dim]
    index = (torch.arange(size, device=x.device) - by_B[:, None]).clamp(min=0)
    shape = [1] * x.ndim
    shape[0], shape[dim] = len(x), size
    return x.gather(dim, index.view(shape).expand(x.shape))
