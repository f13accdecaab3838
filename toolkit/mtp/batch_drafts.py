"""The head over many sequences at once, each as long as it is, with keys and values of its own.

`HeadDrafter` goes through one sequence and a head of any number of layers. Answers to learn from are written hundreds
at a time, and of a pass over them each keeps another number of drafts. Here the first layer drafts, and where it is the
only one it is applied again for further drafts; of a head with several layers one draft a pass is made.

    B rows, U prompts, W columns of a prompt, m columns of fresh hidden states, k drafts, H hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedModel

from toolkit.mtp.head import MtpHead, Trunk
from toolkit.mtp.row_cache import RowCache

__all__ = ["BatchDrafter", "Draw", "trunk_for"]

Draw = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Chooses a token for each row after drafts [B, j] by logits [B, V]; gives tokens (B,) and what they are drawn from."""


class BatchDrafter:
    """Drafts for all rows.

    Args:
        count: drafts a pass; no more are made than the head can in a batch.
    """

    def __init__(self, head: MtpHead, trunk: Trunk, count: int) -> None:
        self.head, self.trunk = head, trunk
        self.count = count if len(head.layers) == 1 else min(1, count)
        self._rows: RowCache | None = None

    def begin(self, hidden_UWH: torch.Tensor, ids_UW: torch.Tensor, lengths_U: torch.Tensor) -> None:
        """Read the prompts, padded on the left, but for each one's last token, whose next one is not known yet."""
        self._rows = RowCache(DynamicCache(), len(ids_UW), ids_UW.device)
        if ids_UW.shape[1] > 1:
            self._run(hidden_UWH[:, :-1], ids_UW[:, 1:], lengths_U - 1)

    def pick(self, rows: torch.Tensor) -> None:
        """As `RowCache.pick`."""
        assert self._rows is not None
        self._rows.pick(rows)

    def draft(
        self, hidden_BmH: torch.Tensor, tokens_Bm: torch.Tensor, fresh_B: torch.Tensor, count: int, draw: Draw
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Go on from hidden states that the head has not had.

        Args:
            hidden_BmH, tokens_Bm: the model's hidden states and the token after each, the first `fresh_B` of a row.
            count: drafts wanted.

        Returns:
            Drafts [B, k], and the distribution [B, V] that each was drawn from.
        """
        rows, count = self._rows, min(count, self.count)
        assert rows is not None
        every, last_B = torch.arange(len(fresh_B), device=fresh_B.device), fresh_B - 1
        hidden_BH = self._run(hidden_BmH, tokens_Bm)[every, last_B]
        rows.take_back(tokens_Bm.shape[1] - fresh_B)
        drafts_Bk, shares = tokens_Bm[:, :0], list[torch.Tensor]()
        while len(shares) < count:
            if shares:
                hidden_BH = self._run(hidden_BH[:, None], drafts_Bk[:, -1:])[:, -1]
            tokens_B, shares_BV = draw(drafts_Bk, self.trunk.logits(hidden_BH).float())
            drafts_Bk, shares = torch.cat([drafts_Bk, tokens_B[:, None]], 1), [*shares, shares_BV]
        if count > 1:
            rows.take_back(torch.full_like(fresh_B, count - 1))
        return drafts_Bk, shares

    def _run(
        self, hidden_BmH: torch.Tensor, tokens_Bm: torch.Tensor, counts_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The first layer's hidden states [B, m, H]; a row's number t has the hidden state of its token t."""
        rows, new = self._rows, tokens_Bm.shape[1]
        assert rows is not None
        valid_BC, places_Bm = rows.reading(new, counts_B)
        hidden_BmH = hidden_BmH.to(self.head.layers[0].eh_proj.weight.dtype)  # type: ignore[union-attr, arg-type]
        mask = _mask(valid_BC, new, self.trunk.window)
        if self.head.config._attn_implementation == "eager":
            low = torch.finfo(hidden_BmH.dtype).min
            mask = hidden_BmH.new_zeros(mask.shape).masked_fill(~mask, low)
        return self.head.step(self.trunk, 1, hidden_BmH, tokens_Bm, places_Bm + 1, mask, rows.cache)


def trunk_for(head: MtpHead, base: PreTrainedModel) -> Trunk:
    """What the head shares with its model; from here on it computes attention as the model does."""
    head.follow_attention(base.config._attn_implementation)
    return Trunk.of(base)


def _mask(valid_BC: torch.Tensor, new: int, window: int | None) -> torch.Tensor:
    """Who is seen by the last `new` columns [B, 1, new, C]; padding sees itself, since nothing at all would be NaN."""
    steps = torch.arange(valid_BC.shape[1], device=valid_BC.device)
    back = steps[-new:, None] - steps
    seen = (back >= 0) & (back < window if window else True)
    return (seen & valid_BC[:, None].bool() | (back == 0))[:, None]
