"""Base against adapted on the same held-out examples: loss of the answer's tokens, how good the answers are, and
perplexity on general text, which says what was forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.data import HeldOut
from toolkit.data.storage import count_trained
from toolkit.errors import DataError
from toolkit.evaluate.generate import answer, answer_ids, read_answers, writing
from toolkit.evaluate.metrics import LOSS, find_metric, metrics_for, score
from toolkit.evaluate.preferences import answer_figures, answer_logps
from toolkit.ops.label_logits import label_logits, padded, summed_loss
from toolkit.steps import advance, part

__all__ = ["Comparison", "Measured", "compare", "held_out_loss", "measure", "read_windows", "score_now"]

Read = Callable[[Sequence[int], Sequence[int]], str]

_MOST_WINDOWS = 64


@dataclass(frozen=True)
class Measured:
    """Loss in nats per answer token and share of exact answers (None where no answer is wanted), and the answers.

    `figures` are the other metrics' means by name and `perplexity` of general text; `scores` are those of each answer,
    by the metric that was chosen.
    """

    loss: float | None
    exact_match: float | None
    answers: tuple[str, ...]
    figures: dict[str, float] = field(default_factory=dict)
    scores: tuple[float, ...] = ()
    logps: tuple[float, ...] = ()
    """Log-probabilities in nats of held-out good and bad answers."""
    written: Sequence[Sequence[int]] = ()
    """The answers' tokens."""
    rewards: Sequence[Mapping[str, float | None]] = ()
    """Of each answer, by name, where the run learns from rewards; None: one does not apply."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able figures, answers left out."""
        return {"loss": self.loss, "exact_match": self.exact_match, **self.figures}


@dataclass(frozen=True)
class Comparison:
    """The same examples before and after."""

    examples: int
    base: Measured
    adapted: Measured
    rewards: dict[str, float] = field(default_factory=dict)
    """Of good and bad answers, the adapted model against its reference (`toolkit.evaluate.preferences`)."""

    @property
    def better(self) -> list[int]:
        """Examples that the adapted model answers better than the base."""
        return self._changed(1)

    @property
    def worse(self) -> list[int]:
        """Examples that it answers worse."""
        return self._changed(-1)

    def _changed(self, sign: int) -> list[int]:
        pairs = zip(self.base.scores, self.adapted.scores, strict=True)
        return [index for index, (before, after) in enumerate(pairs) if sign * (after - before) > 0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able figures, answers left out."""
        figures = {"examples": self.examples, "base": self.base.to_dict(), "adapted": self.adapted.to_dict()}
        rewards = {"preference": {"answers": len(self.adapted.logps), **self.rewards}} if self.rewards else {}
        return {**figures, **rewards, "answers": {"better": len(self.better), "worse": len(self.worse)}}


def compare(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Dataset,
    questions: Sequence[HeldOut],
    *,
    metric: str = LOSS,
    general: Dataset | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    read: Read | None = None,
    judged: Dataset | None = None,
) -> Comparison:
    """Measure the base (adapter switched off) and the adapted model.

    Args:
        sequences: rows of `input_ids` and `labels`, for the loss.
        questions: prompts and answers wanted; they may be fewer.
        metric: what ranks answers (`find_metric`); exact match, F1 and ROUGE-L are measured anyway.
        general: rows like `sequences` of text that has nothing to do with the task, for perplexity.
        max_new_tokens: longest answer.
        batch_size: prompts, or sequences, at a time.
        read: what is judged of an answer's token ids, its prompt's given; without it their plain text.
        judged: rows like `sequences`, good and bad answers (`answer_figures`), to see which are preferred.
    """
    model.eval()
    model.config.use_cache = True

    def measured() -> Measured:
        return measure(
            model,
            tokenizer,
            sequences,
            questions,
            metric=metric,
            general=general,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            read=read,
            judged=judged,
        )

    with model.disable_adapter():
        base = measured()
    return Comparison(len(questions), base, measured())


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Dataset,
    questions: Sequence[HeldOut],
    *,
    metric: str = LOSS,
    general: Dataset | None = None,
    max_new_tokens: int,
    batch_size: int,
    read: Read | None = None,
    judged: Dataset | None = None,
) -> Measured:
    """Loss, the answers' metrics and the perplexity of the model as it stands."""
    wanted = [question.answer for question in questions]
    metrics = metrics_for(metric, wanted)
    prompts = [question.prompt_ids for question in questions]
    written = answer_ids(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    answers = read_answers(tokenizer, written, prompts, read)
    scores = {name: score(name, function, answers, wanted) for name, function in metrics.items()}
    figures = _means(scores, wanted, metric)
    exact = figures.pop("exact_match", None)
    if general is not None:
        figures["perplexity"] = math.exp(held_out_loss(model, general, batch_size))
    logps = () if judged is None else tuple(answer_logps(model, judged, batch_size))
    figures |= {} if judged is None else answer_figures(logps, judged)
    ranks = scores["exact_match" if metric == LOSS else find_metric(metric)[0]]
    loss = held_out_loss(model, sequences, batch_size) if count_trained(sequences).any() else None
    return Measured(loss, exact, tuple(answers), figures, tuple(ranks), logps, tuple(written))


def _means(scores: Mapping[str, Sequence[float]], wanted: Sequence[str], metric: str) -> dict[str, float]:
    """The metrics' means over the questions that have an answer; of the chosen one over all, where none has."""
    answered = [index for index, answer in enumerate(wanted) if answer]
    if answered:
        return {name: sum(each[index] for index in answered) / len(answered) for name, each in scores.items()}
    chosen = None if metric == LOSS else find_metric(metric)[0]
    return {name: sum(each) / len(each) for name, each in scores.items() if each and name == chosen}


def score_now(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[HeldOut],
    *,
    metric: str,
    max_new_tokens: int,
    batch_size: int,
    read: Read | None = None,
) -> dict[str, float]:
    """The mean of one metric by its short name, in the middle of training; settings come back as they were."""
    name, function = find_metric(metric)
    prompts = [question.prompt_ids for question in questions]
    with writing(model), part("evaluate"):
        answers = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, read=read)
    scores = score(name, function, answers, [question.answer for question in questions])
    return {name: sum(scores) / len(scores)}


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, sequences: Dataset, batch_size: int) -> float:
    """Mean loss in nats of every labelled token."""
    total, count = 0.0, 0
    order = sorted(sequences, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask, labels = padded(batch, device=model.device)
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        logits, targets, _ = label_logits(model, given, labels)
        total += float(summed_loss(logits, targets))
        count += len(targets)
        advance(start + len(batch), len(order), "sequences")
    return total / max(1, count)


def read_windows(tokenizer: PreTrainedTokenizerBase, path: Path, length: int) -> Dataset:
    """Rows of `input_ids` and equal `labels`, both (length,), from the start of a UTF-8 text, 64 of them at most.

    Raises:
        DataError: the file cannot be read as text, or is shorter than one window.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"eval.regression: {path}: not a readable UTF-8 text ({error})") from None
    # A token has a character at least, so what lies beyond is never looked at.
    ids = list(tokenizer(text[: _MOST_WINDOWS * length * 16], add_special_tokens=False, verbose=False)["input_ids"])
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:_MOST_WINDOWS]
    if not windows:
        raise DataError(f"eval.regression: {path}: {len(ids)} tokens, less than one training.max_length of {length}")
    return Dataset.from_dict({"input_ids": windows, "labels": windows})
