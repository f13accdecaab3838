"""Which of two answers a model prefers: log-probabilities of held-out pairs, with the adapter on or off.

TRL's trainer has these figures as means over batches, of the adapted model against its reference alone. Here they are
of every pair, of the base as well, so that what was learnt can be told from what the base knew.
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedModel

from toolkit.ops.label_logits import padded
from toolkit.ops.token_scores import sequence_logps
from toolkit.steps import advance

__all__ = ["pair_figures", "pair_logps", "reward_figures"]

Logps = Sequence[tuple[float, float]]
"""Of each pair: log-probabilities in nats of the chosen and of the rejected answer."""


def pair_logps(model: PreTrainedModel, table: Dataset, batch_size: int) -> list[tuple[float, float]]:
    """Of each pair what the model as it stands gives its two answers.

    Args:
        table: rows of `input_ids` and `labels`; rows 2n and 2n+1 are the chosen and the rejected answer of pair n.
        batch_size: sequences at a time.
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
    return list(zip(found[::2], found[1::2], strict=True))


def pair_figures(logps: Logps) -> dict[str, float]:
    """Of one model: the share of pairs whose chosen answer is the more probable one, and means in nats."""
    count = max(1, len(logps))
    return {
        "preference_accuracy": sum(chosen > rejected for chosen, rejected in logps) / count,
        "logps_chosen": sum(chosen for chosen, _ in logps) / count,
        "logps_rejected": sum(rejected for _, rejected in logps) / count,
    }


def reward_figures(logps: Logps, reference: Logps, beta: float) -> dict[str, float]:
    """Of the adapted model against its reference, by TRL's names: the reward of an answer is beta times what its
    log-probability has gained; the share of pairs whose chosen answer has the higher one, and the mean difference."""
    pairs = zip(logps, reference, strict=True)
    margins = [beta * ((chosen - before[0]) - (rejected - before[1])) for (chosen, rejected), before in pairs]
    count = max(1, len(margins))
    return {"rewards/accuracies": sum(each > 0 for each in margins) / count, "rewards/margins": sum(margins) / count}
