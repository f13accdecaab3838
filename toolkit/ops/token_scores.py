"""What preference losses ask of each labelled token: its log-probability and figures to log, by the model's own logits.

TRL's fused head multiplies hidden states by the head's weights by itself: it passes over what a family's own forward
does to its logits, and on a CPU it computes those of every token. Here are the same fields from `label_logits`.

    B sequences, L tokens in each, N labels, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from toolkit.labels import IGNORED
from toolkit.ops.label_logits import forward_inputs, label_logits

__all__ = ["TokenScores", "each_token", "sequence_logps", "token_scores"]

_PER_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
"""The fields of `TokenScores` that have a value for each token."""


@dataclass(frozen=True)
class TokenScores:
    """All [B, L-1], 0 where the next token has no label; the names are those of TRL's `FusedCausalLMOutput`.

    `log_sum_sq_probs` is the logarithm of the sum of squared probabilities. Only `log_probs` has a gradient.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor
    log_sum_sq_probs: torch.Tensor
    aux_loss: torch.Tensor | None
    """The family's load-balancing loss, where it was asked for and the family computes one."""


def each_token(scores: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> TokenScores:
    """Scores, ours or TRL's, with what `change` makes of each token's values [B, L-1]."""
    return TokenScores(**{name: change(getattr(scores, name)) for name in _PER_TOKEN}, aux_loss=scores.aux_loss)


def token_scores(
    model: nn.Module,
    inputs: dict[str, Any],
    labels_BL: torch.Tensor,
    *,
    balanced: bool = False,
    temperature: float = 1.0,
) -> TokenScores:
    """Scores of every labelled token.

    Args:
        inputs: of the model's forward, labels left out. labels_BL: token ids, IGNORED where there is none.
        balanced: whether the load-balancing loss is asked for. temperature: what logits are divided by.
    """
    logits_NV, labels_N, outputs = label_logits(model, forward_inputs(inputs, balanced=balanced), labels_BL)
    logits_NV = logits_NV if temperature == 1.0 else logits_NV.float() / temperature
    labelled = labels_BL[:, 1:] != IGNORED

    def spread(values_N: torch.Tensor) -> torch.Tensor:
        return values_N.new_zeros(labelled.shape).masked_scatter(labelled, values_N)

    log_probs = spread(-cross_entropy(logits_NV.float(), labels_N, reduction="none"))
    with torch.no_grad():
        logits_NV = logits_NV.detach().float()
        log_probs_NV = logits_NV.log_softmax(-1)
        return TokenScores(
            log_probs=log_probs,
            entropy=spread(-(log_probs_NV.exp() * log_probs_NV).sum(-1)),
            mean_logits=spread(logits_NV.mean(-1)),
            is_top1=spread(logits_NV.argmax(-1) == labels_N),
            log_sum_sq_probs=spread((2 * log_probs_NV).logsumexp(-1)),
            aux_loss=outputs.get("aux_loss"),
        )


@torch.no_grad()
def sequence_logps(model: nn.Module, inputs: dict[str, Any], labels_BL: torch.Tensor) -> torch.Tensor:
    """The log-probability in nats of each sequence's labelled tokens together [B], in fp32."""
    logits_NV, labels_N, _ = label_logits(model, forward_inputs(inputs, balanced=False), labels_BL)
    log_probs_N = -cross_entropy(logits_NV.float(), labels_N, reduction="none")
    sequence_N = (labels_BL[:, 1:] != IGNORED).nonzero()[:, 0]
    return log_probs_N.new_zeros(len(labels_BL)).index_add(0, sequence_N, log_probs_N)
