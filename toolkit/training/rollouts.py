"""What a run is told whose model writes answers and learns from their rewards; and the rows that its trainer draws.

Rows are numbers of questions, so that TRL's trainers shuffle, repeat and keep numbers and never see text to tokenise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from trl.trainer.utils import split_tensor_dict

from toolkit.data import Question
from toolkit.rewards import Asked, Judge

__all__ = ["Rollouts", "by_prompt", "rows_of"]


@dataclass(frozen=True)
class Rollouts:
    """How answers are written and judged.

    Args:
        method: grpo or rloo. options: the fields of the recipe's section, by TRL's names.
        judge: computes rewards. train, held_out: what is asked.
        write: answers' tokens of prompts' tokens, sampled. read: what is judged of an answer's tokens, its prompt's
            given. decode: an answer's plain text, special tokens removed. figures: of the last writing, for the log.
        from_start: the reference is the adapter that training starts from, not the base.
        share: answers of a forward pass that have one prompt for certain.
    """

    method: str
    options: Mapping[str, Any]
    judge: Judge
    train: Sequence[Question]
    held_out: Sequence[Question]
    write: Callable[[Sequence[Sequence[int]]], list[list[int]]]
    read: Callable[[Sequence[int], Sequence[int]], str]
    decode: Callable[[Sequence[int]], str]
    figures: Callable[[], Mapping[str, float]] = dict
    from_start: bool = False
    share: int = 1

    def numbers(self, *, held_out: bool) -> Dataset:
        """The rows that a trainer draws: n for a training question, -1 - n for a held-out one."""
        count = len(self.held_out if held_out else self.train)
        return Dataset.from_dict({"prompt": [-1 - n if held_out else n for n in range(count)]})

    def question(self, number: int) -> Question:
        """What a row asks."""
        return self.train[number] if number >= 0 else self.held_out[-1 - number]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each training prompt (questions,)."""
        return np.asarray([len(question.prompt_ids) for question in self.train], dtype=np.int64)

    def asked(
        self, numbers: Sequence[int], written: Sequence[Sequence[int]], state: Mapping[str, float | None]
    ) -> Asked:
        """Answers as rewards see them, one of `written` for each row's number."""
        questions = [self.question(number) for number in numbers]
        texts = [self.decode(ids) for ids in written]
        chat = [not isinstance(question.prompt, str) for question in questions]
        return Asked(
            prompts=[question.prompt for question in questions],
            completions=[
                [{"role": "assistant", "content": text}] if is_chat else text
                for text, is_chat in zip(texts, chat, strict=True)
            ],
            completion_ids=[list(ids) for ids in written],
            texts=[self.read(ids, q.prompt_ids) for ids, q in zip(written, questions, strict=True)],
            answer=[question.answer for question in questions],
            trainer_state=state,
            columns=_columns(questions),
        )


def _columns(questions: Sequence[Question]) -> dict[str, list[Any]]:
    """The questions' further columns, by name."""
    names = dict.fromkeys(name for question in questions for name in question.columns)
    return {name: [question.columns.get(name) for question in questions] for name in names}


def by_prompt(batches: Sequence[Mapping[str, Any]], together: int) -> list[dict[str, Any]]:
    """The same rows in batches of the same sizes, those that are `asked` the same next to each other.

    Args:
        batches: of equal sizes; rows are items of tensors and lists. together: batches that were shuffled as one.
    """
    dealt: list[dict[str, Any]] = []
    for start in range(0, len(batches), together):
        few = batches[start : start + together]
        order = torch.cat([batch["asked"] for batch in few]).argsort(stable=True)
        whole = {name: rows_of(_joined([batch[name] for batch in few]), order) for name in few[0]}
        dealt += split_tensor_dict(whole, len(few))
    return dealt


def _joined(values: Sequence[Any]) -> Any:
    """Rows of several batches, one after the other; what is no rows is that of the first."""
    first = values[0]
    if isinstance(first, torch.Tensor) and first.ndim:
        return torch.cat(list(values))
    return [item for each in values for item in each] if isinstance(first, list) else first


def rows_of(value: Any, wanted: torch.Tensor) -> Any:
    """Of a batch's tensor or list the rows that `wanted` marks, or all in its order; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value[wanted] if value.ndim and len(value) == len(wanted) else value
    if not isinstance(value, list):
        return value
    numbers = wanted.nonzero().flatten() if wanted.dtype == torch.bool else wanted
    return [value[number] for number in numbers.tolist()]
