"""Whether answers that end when they are written greedily end when they are sampled, too.

A base that never learnt a chat's tokens has rows for them that no adapter of its layers makes likely: the end of an
answer may be the likeliest token where it is due, and still be drawn once in fifty times.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from toolkit.labels import IGNORED
from toolkit.ops.label_logits import label_logits, padded

__all__ = ["unsure_end"]

_LOOKED_AT = 64
_GREEDY, _SAMPLED = 0.9, 0.2
"""The least share of answers that end greedily, and the most of their ends' probability, where that is told."""


@torch.no_grad()
def unsure_end(
    model: PreTrainedModel, sequences: Dataset, ends: Collection[int], batch_size: int
) -> tuple[int, float] | None:
    """The token that ends answers greedily and rarely when they are sampled, and its mean probability where it is due.

    Args:
        sequences: rows of `input_ids` and `labels`; the first 64 are looked at. ends: tokens that may end an answer.

    Returns:
        None where there is no such token.
    """
    rows = list(_at_their_ends(sequences, ends))
    chances, hits, tokens = list[float](), list[bool](), list[int]()
    for start in range(0, len(rows), batch_size):
        ids, mask, labels = padded(rows[start : start + batch_size], device=model.device)
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        logits, targets, _ = label_logits(model, given, labels)
        chances += logits.float().softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
        hits += (logits.argmax(-1) == targets).tolist()
        tokens += targets.tolist()
    if not rows or sum(hits) < _GREEDY * len(hits) or (mean := sum(chances) / len(chances)) > _SAMPLED:
        return None
    return max(set(tokens), key=tokens.count), mean


def _at_their_ends(sequences: Dataset, ends: Collection[int]) -> Iterator[dict[str, Any]]:
    """Rows whose one label is that of their last answer's end."""
    for row in sequences.select(range(min(len(sequences), _LOOKED_AT))):
        labels = row["labels"]
        place = next((place for place in reversed(range(len(labels))) if labels[place] in ends), None)
        if place is not None:
            alone = [IGNORED] * len(labels)
            alone[place] = labels[place]
            yield {"input_ids": row["input_ids"], "labels": alone}
