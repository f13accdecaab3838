"""Rows that are prompts for the model to answer, with the answer that a reward sees.

TRL is given prompts as text or messages and tokenises them at every step, with whatever the template does then. Here
each prompt is the tokens that stand before the answer in training on single answers, written once by the same law.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from toolkit.data.encode import TOO_LONG, EncodedRow, Encoder
from toolkit.data.formats import SHAPES, Example, Shape
from toolkit.data.problems import InvalidRow

__all__ = ["QUESTION_SHAPES", "Question", "QuestionEncoder", "Questions"]

QUESTION_SHAPES: Mapping[str, Shape] = {name: shape for name, shape in SHAPES.items() if name != "text"}
"""The formats of rows that ask something, by name."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to answer.

    `prompt_ids` are its tokens, `prompt` its messages or its text, `answer` what was wanted, as an evaluator reads it,
    and `columns` further columns of the row that rewards asked for.
    """

    place: str
    prompt_ids: tuple[int, ...]
    prompt: Any
    answer: str
    columns: Mapping[str, Any]


class QuestionEncoder(Encoder):
    """As `Encoder`; of each row the last answer is wanted, and its prompt leaves room to write.

    Args:
        room: tokens that may be written to a prompt. given: as there, but `train_on`.
    """

    def __init__(self, *given: Any, room: int, **named: Any) -> None:
        super().__init__(*given, **{**named, "train_on": "last"})
        self._room = room

    def encode(self, examples: Sequence[Example], *, hold_out: bool = False) -> list[EncodedRow | InvalidRow]:
        """Each example's tokens with its question, or why it cannot be asked; `hold_out` makes no difference."""
        return [self._asked(row) for row in super().encode(examples, hold_out=True)]

    def _asked(self, row: EncodedRow | InvalidRow) -> EncodedRow | InvalidRow:
        if isinstance(row, InvalidRow):
            return row
        question = row.examples[-1].held_out
        if question is None:
            return InvalidRow("no prompt", "nothing stands before the answer, so there is nothing to ask")
        tokens = len(question.prompt_ids)
        if tokens + self._room > self.max_length:
            most = f"training.max_length={self.max_length} leaves with {self._room} to be written"
            return InvalidRow(TOO_LONG, f"a prompt of {tokens} tokens, more than {most}")
        return row


class Questions(Sequence[Question]):
    """The questions of encoded examples, made as they are asked for.

    Args:
        examples: what was encoded. rows: what `QuestionEncoder` made of each.
    """

    def __init__(self, examples: Sequence[Example], rows: Sequence[EncodedRow]) -> None:
        self._examples, self._rows = examples, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example, question = self._examples[index], self._rows[index].examples[-1].held_out
        assert question is not None
        prompt = [dict(turn) for turn in example.messages[:-1]] if example.messages else example.prompt
        return Question(question.place, question.prompt_ids, prompt, question.answer, example.columns)

    def __iter__(self) -> Iterator[Question]:
        return (self[index] for index in range(len(self)))
