"""Rows that are prompts for the model to answer, with the answer that a reward sees, or without one.

TRL is given prompts as text or messages and tokenises them at every step, with whatever the template does then. Here
each prompt is the tokens that stand before the answer in training on single answers, written once by the same law. A
row without an answer is read with a word in its place, so that the same law reads its prompt; the word is then cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from toolkit.data.conversation import check_messages
from toolkit.data.encode import TOO_LONG, EncodedRow, Encoder
from toolkit.data.formats import CHAT, SHAPES, Example, Shape, carries, conversation, present
from toolkit.data.problems import InvalidRow
from toolkit.data.speakers import as_turns
from toolkit.data.turns import CLOSED

__all__ = ["QUESTION_SHAPES", "Question", "QuestionEncoder", "Questions"]

_STAND_IN = "word"
_NO_TEXT = "an answer that is neither text nor a number is not read; rewards see it where rewards.columns names it"


def _parse_prompt(values: Mapping[str, Any]) -> Example:
    prompt, given = present(values, "prompt"), values.get("answer")
    is_read = isinstance(given, (str, int, float)) and carries(given)
    notes = (_NO_TEXT,) if carries(given) and not is_read else ()
    answer = str(given) if is_read else _STAND_IN
    if isinstance(prompt, str) and not prompt.lstrip().startswith("[{"):
        made = SHAPES["prompt-completion"].parse({**values, "completion": answer})
        return replace(made, unanswered=not is_read, notes=(*made.notes, *notes))
    asked = check_messages(as_turns(prompt, "prompt"), "prompt")
    if asked[-1]["role"] == "assistant":
        raise InvalidRow(
            "answered prompt", "prompt ends in an assistant turn; data.columns: {messages: prompt} reads it"
        )
    made = conversation(values, [*asked, {"role": "assistant", "content": answer}], given=len(asked))
    return replace(made, unanswered=not is_read, notes=(*made.notes, *notes))


QUESTION_SHAPES: Mapping[str, Shape] = {
    **{name: shape for name, shape in SHAPES.items() if name != "text"},
    "prompt": Shape(("prompt",), ("answer", *CHAT), _parse_prompt),
}
"""The formats of rows that ask something, by name."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to answer.

    `prompt_ids` are its tokens, `prompt` its messages or its text, `answer` what was wanted, as an evaluator reads it
    (None where the row has no answer), and `columns` further columns of the row that rewards asked for.
    """

    place: str
    prompt_ids: tuple[int, ...]
    prompt: Any
    answer: str | None
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
        rows = super().encode(examples, hold_out=True)
        if all(example.unanswered for example in examples):
            del self.notices[CLOSED]
        return [self._asked(example, row) for example, row in zip(examples, rows, strict=True)]

    def _asked(self, example: Example, row: EncodedRow | InvalidRow) -> EncodedRow | InvalidRow:
        if isinstance(row, InvalidRow):
            return row
        question = row.examples[-1].held_out
        if question is None:
            return InvalidRow("no prompt", "nothing stands before the answer, so there is nothing to ask")
        tokens = len(question.prompt_ids)
        if tokens + self._room > self.max_length:
            most = f"training.max_length={self.max_length} leaves with {self._room} to be written"
            return InvalidRow(TOO_LONG, f"a prompt of {tokens} tokens, more than {most}")
        return _without_answer(row) if example.unanswered else row


def _without_answer(row: EncodedRow) -> EncodedRow:
    """The row's prompt alone, of which nothing is trained."""
    last = row.examples[-1]
    assert last.held_out is not None
    ids, held_out = np.asarray(last.held_out.prompt_ids, dtype=np.int32), replace(last.held_out, answer="")
    return EncodedRow((replace(last, ids=ids, trained=np.zeros(len(ids), dtype=np.bool_), held_out=held_out),), turns=0)


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
        answer = None if example.unanswered else question.answer
        return Question(question.place, question.prompt_ids, prompt, answer, example.columns)

    def __iter__(self) -> Iterator[Question]:
        return (self[index] for index in range(len(self)))
