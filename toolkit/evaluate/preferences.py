"""Which answers a model prefers: log-probabilities of held-out good and bad answers, with the adapter on or off.

TRL's trainers have these figures as means over batches, of the adapted model against its reference alone. Here they are
of every answer, of the base as well, so that what was learnt can be told from what the base knew.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from toolkit.data.storage import are_pairs, desirable
from toolkit.ops.label_logits import padded
from toolkit.ops.token_scores import sequence_logps
from toolkit.steps import advance

__all__ = ["answer_figures", "answer_logps", "reward_figures"]


def answer_logps(model: PreTrainedModel, table: Dataset, batch_size: int) -> list[float]:
    """What the model as it stands gives each answer, in nats.

    Args:
        table: rows of `input_ids` and `labels`. batch_size: sequences at a time.
    """
    lengths = [len(ids) for ids in table["input_ids"]]
    order = sorted(range(len(table)), key=lambda row: lengths[row])
    found = [0.0] * len(table)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask, labels = padded([table[row] for row in rows], device=model.device)
        logps = sequence_logps(model, {"input_ids": ids, "attention_mask": mask}, labels)
        for row, logp in zip(rows, logps.tolist(), strict=True):
            found[row] = logp
        advance(start + len(rows), len(order), "answers")
    return found


def answer_figures(logps: Sequence[float], table: Dataset) -> dict[str, float]:
    """Of one model: means in nats of good and of bad answers; of pairs the share whose good one is the more probable.

    Args:
        logps: of each row. table: the rows, chosen and rejected answers in turn, or with a column `desirable`.
    """
    good, values = desirable(table), np.asarray(logps)
    found = {"logps_chosen": values[good], "logps_rejected": values[~good]}
    shares = {"preference_accuracy": float((values[::2] > values[1::2]).mean())} if are_pairs(table) else {}
    return shares | {name: float(each.mean()) for name, each in found.items() if len(each)}


def reward_figures(rewards: Sequence[float], table: Dataset) -> dict[str, float]:
    """By TRL's names: the share of pairs whose chosen answer has the higher reward, and the mean difference.

    Without pairs each good answer is compared with each bad one. Nothing where one kind is missing.

    Args:
        rewards: of each row; beta times what its log-probability has gained over the reference, or its own mean.
        table: as for `answer_figures`.
    """
    good, values = desirable(table), np.asarray(rewards)
    better, worse = values[good], values[~good]
    if not len(better) or not len(worse):
        return {}
    right = better > worse if are_pairs(table) else better[:, None] > worse[None]
    return {"rewards/accuracies": float(right.mean()), "rewards/margins": float(better.mean() - worse.mean())}
