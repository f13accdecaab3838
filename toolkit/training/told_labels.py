"""TRL's chunked head on labelled positions that the host knows, so that nobody waits for a card to count them.

TRL finds them with a mask. torch then waits twice in forward and twice in backward, and sorts what it writes back,
since it cannot know that no position comes twice. The kernel and what it is given are TRL's.

    B sequences, L tokens in each, N labels, H hidden
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from toolkit.architecture import balancing_loss
from toolkit.labels import IGNORED
from toolkit.ops.label_logits import forward_inputs, labels_ahead
from toolkit.ops.unordered import write_in_any_order
from toolkit.rehearsal.fused_head import has_plain_head
from toolkit.rehearsal.loss import TILE_WORDS

__all__ = ["Scores", "can_score", "score_labelled", "told_labels"]


def can_score(model: PeftModel, *, balanced: bool) -> bool:
    """Whether nothing that TRL's head would do is left out: no factor of logits, and a load-balancing loss if asked."""
    base = model.get_base_model()
    return has_plain_head(base.config) and not (balanced and balancing_loss(base) is None)


@dataclass(frozen=True)
class Scores:
    """Of each labelled position: log-probability in nats, entropy in nats, whether its label is the likeliest, [N]."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    aux_loss: torch.Tensor | None
    """The load-balancing loss, where it was asked for."""


def told_labels(labels_BL: torch.Tensor) -> torch.Tensor:
    """Positions that predict a label, counted through all sequences, and those labels: [2, N]. To be asked on a CPU."""
    ahead = labels_ahead(labels_BL).flatten()
    positions = (ahead != IGNORED).nonzero().flatten()
    return torch.stack((positions, ahead[positions]))


def score_labelled(model: PeftModel, inputs: dict[str, Any], told_2N: torch.Tensor, *, balanced: bool) -> Scores:
    """What TRL's head gives of a batch, at the labelled positions alone.

    Args:
        inputs: of the model's forward, and labels. told_2N: of `told_labels`, where the model is.
        balanced: whether the load-balancing loss is asked for.
    """
    base, (positions, labels) = model.get_base_model(), told_2N
    outputs = base.base_model(**forward_inputs(inputs, balanced=balanced))
    hidden_NH = outputs.last_hidden_state.flatten(0, 1).index_select(0, positions)
    write_in_any_order(hidden_NH)
    head = base.get_output_embeddings()
    log_probs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
        hidden_NH, head.weight, head.bias, labels, 1.0, TILE_WORDS, None, 1.0, ("entropy", "is_top1")
    )
    balance = None
    if balanced and (find := balancing_loss(base)) is not None:
        text = base.config.get_text_config()
        balance = find(outputs.router_logits, text.num_experts, text.num_experts_per_tok, inputs.get("attention_mask"))
    return Scores(log_probs, entropy, is_top1, balance)
