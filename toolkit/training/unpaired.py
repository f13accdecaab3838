"""KTO: TRL's `KTOTrainer` with its own loss, on good and bad answers that come tokenised and with a known reference.

Beside its answers a batch has one more sequence a row: the row's prompt with another row's answer. They give the mean
distance from the reference that KTO compares with. Which answer goes with which prompt is decided once, as TRL does, so
that their reference is known, too. Rows therefore keep their order. TRL splits pairs into good answers first and bad
ones after, so that most batches have one kind. Here good and bad ones take turns, a pair's two half the data apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from trl import KTOConfig, KTOTrainer

from toolkit.data.storage import are_pairs, desirable, first_trained, sequence_lengths
from toolkit.labels import IGNORED
from toolkit.ops.label_logits import padded
from toolkit.training.adapter_steps import RunContext
from toolkit.training.preference import Pairs, PreferenceSteps, Scored

__all__ = ["Answers", "KtoSteps", "answers_of", "kto_config", "weight_advice"]

_MOST_WEIGHT = 4 / 3
"""Of good answers over bad ones."""


class Answers(Pairs):
    """Good and bad answers in the order in which they are trained; the second sequence of a pair is the mismatched one.

    Args:
        table: rows of `input_ids`, `labels` and `desirable`; without that column, chosen and rejected answers in turn.
        together: rows whose answers are exchanged, a batch's; 1 where nothing is exchanged.
    """

    what = "answers"

    def __init__(self, table: Dataset, together: int) -> None:
        super().__init__(table)
        self.together = together
        self.sides = (0, 1) if together > 1 else (0,)
        self.order = np.arange(len(table))
        if are_pairs(table):
            chosen = self.order[::2]
            self.order = np.stack([chosen, np.roll(chosen, len(chosen) // 2) + 1], axis=1).reshape(-1)
        self.desirable = desirable(table)[self.order]

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def _sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each row of the table its tokens, and those before its answer."""
        return sequence_lengths(self.table), first_trained(self.table)

    def partner(self, number: int) -> int:
        """The row whose answer goes with this one's prompt: the one before it in its batch, or the batch's last."""
        start = number - number % self.together
        size = min(self.together, len(self) - start)
        return max(0, number - 1) if size == 1 else start + (number - start - 1) % size

    def sequence(self, number: int, side: int) -> Mapping[str, Any]:
        """`input_ids` and `labels` of a row (0), or of its prompt with its partner's answer (1).

        That is cut to the length of the longest row.
        """
        own: dict[str, Any] = self.rows[int(self.order[number])]
        if side == 0:
            return own
        row = int(self.order[self.partner(number)])
        other, (lengths, prompts) = self.rows[row], self._sizes
        before, begins = int(prompts[self.order[number]]), int(prompts[row])
        longest = int(lengths.max())
        return {
            name: np.concatenate([own[name][:before], other[name][begins:]])[:longest]
            for name in ("input_ids", "labels")
        }

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of the longer of each row's two sequences (rows,)."""
        lengths, prompts = (sizes[self.order] for sizes in self._sizes)
        if self.together == 1:
            return lengths
        partners = np.asarray([self.partner(number) for number in range(len(self))])
        mismatched = prompts + (lengths - prompts)[partners]
        found: NDArray[np.int64] = np.maximum(lengths, np.minimum(mismatched, lengths.max()))
        return found

    def longest(self, count: int, share: int = 1) -> list[int]:
        """Numbers of the `count` rows that take most memory: the mismatched sequences have no gradients."""
        found: list[int] = np.argsort(-self._sizes[0][self.order], kind="stable")[:count].tolist()
        return found


def answers_of(table: Dataset, *, together: int, loss_type: str) -> Answers:
    """The rows of a run whose batches have so many; without the distance from the reference none are exchanged."""
    return Answers(table, together if loss_type == "kto" else 1)


def weight_advice(answers: Answers, options: Mapping[str, Any]) -> str | None:
    """What to change where one kind of answers outweighs the other; the range is that of the paper's equation 8."""
    good = int(answers.desirable.sum())
    bad = len(answers) - good
    if not good or not bad:
        return f"kto: all {len(answers)} answers are {'good' if good else 'bad'}; it learns what to do from both kinds"
    ratio = good * options["desirable_weight"] / (bad * options["undesirable_weight"])
    if good == bad or 1 <= ratio <= _MOST_WEIGHT:
        return None
    name, factor = ("undesirable_weight", ratio) if ratio > 1 else ("desirable_weight", 1 / ratio)
    wanted = f"set kto.{name} to {options[name] * factor:.3g}, so that both kinds weigh the same"
    return f"kto: {good} good and {bad} bad answers; {wanted}"


class _Collator:
    """Answers to TRL's unpaired batch, padded on the right."""

    def __init__(self, train: Answers, held_out: Answers | None, pad_token_id: int) -> None:
        self.train, self.held_out, self.pad_token_id = train, held_out, pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        answers = self.held_out if rows[0]["held_out"] else self.train
        assert answers is not None
        numbers = [row["pair"] for row in rows]
        batch = {"label": torch.from_numpy(answers.desirable[numbers])}
        for side, name in zip(answers.sides, ("", "KL_"), strict=False):
            ids, mask, labels = padded([answers.sequence(number, side) for number in numbers], self.pad_token_id)
            batch |= {f"{name}input_ids": ids, f"{name}attention_mask": mask}
            batch[f"{name}completion_mask"] = (labels != IGNORED).long()
        if answers.reference:
            known = torch.tensor([answers.reference[number] for number in numbers])
            batch |= {"ref_logps": known[:, 0].clone(), "ref_KL_logps": known[:, 1].clone()}
        return batch


class _ScoredOnce(Scored):
    """As `Scored`; what the mismatched sequences of the batch have may be known already."""

    def __init__(self, trainer: PreferenceSteps, model: nn.Module, known: torch.Tensor | None) -> None:
        super().__init__(trainer, model)
        self.known = known


class KtoSteps(PreferenceSteps, KTOTrainer):  # type: ignore[misc]
    """TRL's losses of good and bad answers."""

    collator = _Collator

    def _before_layer_major(self, model: nn.Module, samples: Sequence[dict[str, Any]]) -> None:
        """The mismatched sequences of all micro-batches first: a streamed layer knows one pass of each."""
        if not self.calculate_KL:
            return
        assert self.layer_major is not None
        tasks = [lambda sample=sample: self._mismatched(model, sample) for sample in samples]
        for sample, found in zip(samples, self.layer_major.run(tasks), strict=True):
            sample["KL_logps"] = found

    def _mismatched(self, model: nn.Module, sample: dict[str, Any]) -> torch.Tensor:
        inputs = self._prepare_inputs(dict(sample))
        with self.compute_loss_context_manager():
            found: torch.Tensor = KTOTrainer._compute_kl_logps(self, Scored(self, model), inputs)
        return found

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> torch.Tensor | None:
        """As TRL, unless it is known already."""
        known: torch.Tensor | None = model.known
        return KTOTrainer._compute_kl_logps(self, model, batch) if known is None else known

    def _count(self, inputs: Mapping[str, Any], figure: str) -> int:
        good = int(inputs["label"].sum())
        return good if figure.endswith("chosen") else len(inputs["label"]) - good

    def _loss_of_answers(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        given = dict(inputs)
        scored = _ScoredOnce(self, model, given.pop("KL_logps", None))
        loss: torch.Tensor = KTOTrainer.compute_loss(self, scored, given)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL; the margin of an evaluation is that of all its answers, not of the batches that have both kinds."""
        held = self._metrics["eval"]
        both = [held[name] for name in ("rewards/chosen", "rewards/rejected") if held.get(name)]
        if not self.model.training and len(both) == 2:
            held["rewards/margins"] = [sum(both[0]) / len(both[0]) - sum(both[1]) / len(both[1])]
        super().log(logs, start_time)


def kto_config(context: RunContext, common: Mapping[str, Any]) -> KTOConfig:
    """TRL's configuration; `common` are the arguments that every method has."""
    assert context.preference is not None
    return KTOConfig(
        **common,
        **context.preference.options,
        max_length=None,
        remove_unused_columns=False,
        precompute_ref_log_probs=False,
    )
