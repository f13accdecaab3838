"""Log-probabilities of labelled tokens for a trainer of TRL's: by the model's own logits, or by TRL's fused head.

TRL's head multiplies hidden states by the head's weights by itself. It passes over what a family's own forward does to
its logits, and on a CPU it computes those of every token; on a card it saves their memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toolkit.labels import IGNORED
from toolkit.ops.label_logits import pays_to_keep_logits
from toolkit.ops.token_scores import token_scores
from toolkit.training.adapter_steps import AdapterSteps

__all__ = ["ScoredSteps", "answers_first"]


class ScoredSteps(AdapterSteps):
    """Steps whose loss asks for scores; put before a trainer of TRL's that has its fused head."""

    def scores(self, model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor, *, balanced: bool) -> Any:
        """Each labelled token's scores, as `TokenScores` has them; TRL's fused head computes them on a card.

        It does so on a CPU too where the logits would be too many, or where the family gives no load-balancing loss;
        and nowhere if its logits are not the family's own.
        """
        positions = int((labels[:, 1:] != IGNORED).any(0).sum()) if labels.device.type == "cpu" else 0
        pays = positions and not self.wants_trls_balance and pays_to_keep_logits(self.model, len(labels), positions)
        if pays or not self.trusts_fused_head:
            found = token_scores(model, inputs, labels, balanced=balanced, temperature=self.temperature)
            if not balanced or found.aux_loss is not None or not self.trusts_fused_head:
                return found
            self.wants_trls_balance = True
        router = {"output_router_logits": True} if balanced else {}
        return model(**inputs, **router, use_cache=False, labels=labels, fused_lm_head=True)


def answers_first(
    ids_BL: torch.Tensor, mask_BL: torch.Tensor, kept: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences padded on both sides, padded on the right alone; so every token has the place that it has in training.

    TRL pads prompts on the left and answers on the right, and hands over no positions.

    Args:
        ids_BL, mask_BL: prompts and answers. kept: width of the answers, the last columns.

    Returns:
        ids, mask and labels [B, W] (a label is an answer's token), and where among W - 1 predictions those of the
        answers' tokens stand [B, kept].
    """
    length = ids_BL.shape[1]
    lead_B = (mask_BL[:, : length - kept] == 0).sum(1)
    order_BL = (torch.arange(length, device=ids_BL.device) + lead_B[:, None]) % length
    ids_BL, mask_BL = ids_BL.gather(1, order_BL), mask_BL.gather(1, order_BL)
    start_B = length - kept - lead_B
    places_Bk = start_B[:, None] + torch.arange(kept, device=ids_BL.device)
    width = max(2, int(mask_BL.sum(1).max()))
    ids_BL, mask_BL = ids_BL[:, :width], mask_BL[:, :width]
    is_prompt = torch.arange(width, device=ids_BL.device) < start_B[:, None]
    labels_BL = ids_BL.masked_fill(is_prompt | (mask_BL == 0), IGNORED)
    return ids_BL, mask_BL, labels_BL, (places_Bk - 1).clamp(0, width - 2)
