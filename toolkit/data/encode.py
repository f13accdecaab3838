"""An example as token ids with the mask of what is trained.

Chat comes from `turns`: each trained turn is its prompt's tokens and its target's, and turns that one text holds in
their places share an example. The arithmetic is done once here, so that preview, training and evaluation see the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from toolkit.data.conversation import is_trained, odd_thoughts, text_of, thought_of
from toolkit.data.dialogue import Dialogue
from toolkit.data.formats import Example
from toolkit.data.problems import InvalidRow
from toolkit.data.stops import any_of
from toolkit.data.turns import Turn, groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CUT_OFF", "TOO_LONG", "Encoded", "EncodedRow", "Encoder", "HeldOut", "pack_row", "unpack_row"]

TOO_LONG = "longer than max_length"
CUT_OFF = "answer beyond max_length"
_Ids = tuple[list[int], list[int]]
"""Of a prompt, and of what follows it."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out question and its answer.

    `prompt_ids` are exactly the tokens that stand before the answer in training. `answer` is what a perfect generation
    is read as: its text and calls, without thought, special tokens and outer whitespace.
    """

    place: str
    prompt_ids: tuple[int, ...]
    prompt_text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as tokens: `ids` and `trained`, both (T,), and what an evaluator needs where it was asked for."""

    place: str
    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    held_out: HeldOut | None = None
    desirable: bool | None = None
    """Whether its answer is called good or bad."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """What one row became: its examples, and counts of its trained turns, their thoughts, and what ends them."""

    examples: tuple[Encoded, ...]
    turns: int = 1
    thoughts: int = 0
    dropped_thoughts: int = 0
    enders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Piece:
    """One example to be: its prompts and targets, the longest last, and whether all of it is trained."""

    turns: tuple[tuple[str, str], ...]
    chat: bool
    everything: bool


class Encoder:
    """Tokenises examples and marks what is trained.

    Args:
        tokenizer: a fast tokenizer with an end-of-sequence token.
        dialogue: how the model is asked and what ends its answers.
        assistant_only_loss: train assistant turns only, or the whole conversation.
        completion_only_loss: train completions only, or the prompts too.
        train_on: every assistant turn of a conversation, or its last one.
        truncation: what happens to an example of more than `max_length` tokens.
        max_length: tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dialogue: Dialogue,
        *,
        assistant_only_loss: bool = True,
        completion_only_loss: bool = True,
        train_on: Literal["all", "last"] = "all",
        truncation: Literal["drop", "keep_start"] = "drop",
        max_length: int = 1024,
    ) -> None:
        self._tokens = dialogue.tokens
        self._dialogue = dialogue
        self._all_turns = not assistant_only_loss
        self._all_text = not completion_only_loss
        self._last_only = train_on == "last"
        self.cuts = truncation == "keep_start"
        self.max_length = max_length
        self._special = any_of(map(str, tokenizer.all_special_tokens))
        self.notices: Counter[str] = Counter()
        """What deserves a look but is no error, and how many examples it concerns."""

    def encode(self, examples: Sequence[Example], *, hold_out: bool = False) -> list[EncodedRow | InvalidRow]:
        """Each example's tokens, or why it cannot be used; `hold_out` also keeps its last prompt and answer apart."""
        read = [self._read(example) for example in examples]
        pieces = [piece for each in read if not isinstance(each, InvalidRow) for piece in each[0]]
        tokens = iter(self._tokenize([(pair, piece.chat) for piece in pieces for pair in piece.turns]))
        return [
            each if isinstance(each, InvalidRow) else self._row(example, *each, tokens, hold_out)
            for example, each in zip(examples, read, strict=True)
        ]

    def _read(self, example: Example) -> tuple[list[_Piece], EncodedRow] | InvalidRow:
        """The pieces of an example, and its counts."""
        try:
            read = self._chat(example) if example.messages else self._plain(example)
        except InvalidRow as problem:
            return problem
        self._note(example)
        return read

    def _chat(self, example: Example) -> tuple[list[_Piece], EncodedRow]:
        everything = self._all_text if example.given else self._all_turns
        wanted = [i for i, turn in enumerate(example.messages) if turn["role"] == "assistant"]
        if not everything:
            wanted = [i for i in wanted if i >= example.given and is_trained(example.messages[i])]
        if wanted[:1] == [0]:  # no prompt can be fed before it
            wanted = wanted[1:]
            self.notices["an answer before any question is not trained: inference has no prompt for it"] += 1
        if not wanted:
            raise InvalidRow("nothing trained", "it has no assistant turn to train on; remove the row")
        reader = self._dialogue.reader
        turns = self._dialogue.turns(example, wanted[-1:] if everything or self._last_only else wanted)
        self.notices.update(dict.fromkeys(reader.take_notices(), 1))
        pieces = [_piece(group, everything) for group in groups(turns)]
        thoughts = sum(turn.has_thought for turn in turns)
        dropped = sum(bool(thought_of(turn)) for turn in example.messages) if reader.drops_thoughts else 0
        return pieces, EncodedRow((), len(turns), thoughts, dropped, tuple(turn.ender for turn in turns))

    def _plain(self, example: Example) -> tuple[list[_Piece], EncodedRow]:
        try:
            example.text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidRow("not Unicode", "it has an unpaired surrogate (\\ud800…\\udfff)") from None
        if example.prompt is not None and self._dialogue.is_chat:
            self.notices["plain prompts among conversations: inference uses the chat template"] += 1
        start = len(example.prompt or "")
        everything = example.prompt is None or self._all_text
        pieces = [_Piece(((example.text[:start], example.text[start:]),), chat=False, everything=everything)]
        return pieces, EncodedRow((), enders=(self._dialogue.eos_text,))

    def _note(self, example: Example) -> None:
        said = [text_of(turn.get("content")) for turn in example.messages] or [example.text]
        special = self._dialogue.reader.stops.control if example.messages else self._special
        if any(special.search(content) for content in said):
            self.notices["the data contain a special token's text, which becomes that token"] += 1
        parts = [part for turn in example.messages if isinstance(told := turn.get("content"), list) for part in told]
        if any(part.keys() - {"type", "text"} for part in parts):
            self.notices["text parts hold more than their text, such as cache_control: it is not trained"] += 1
        keeps = bool(example.messages) and not self._dialogue.reader.drops_thoughts
        self.notices.update({odd for turn in example.messages for odd in odd_thoughts(turn)} if keeps else ())

    def _tokenize(self, pairs: Sequence[tuple[tuple[str, str], bool]]) -> list[_Ids]:
        """Ids of each prompt and of what follows it."""
        found: dict[int, _Ids] = {}
        for chat in (True, False):
            chosen = {i: pair for i, (pair, is_chat) in enumerate(pairs) if is_chat is chat and (chat or pair[0])}
            prompts = self._tokens.of([before for before, _ in chosen.values()], plain=not chat)
            after = self._tokens.after(list(chosen.values()), prompts, plain=not chat)
            found |= dict(zip(chosen, zip(prompts, after, strict=True), strict=True))
        unprompted = {i: said for i, ((before, said), is_chat) in enumerate(pairs) if not (is_chat or before)}
        whole = self._tokens.of(list(unprompted.values()), plain=True)
        found |= {i: ([], ids) for i, ids in zip(unprompted, whole, strict=True)}
        return [found[i] for i in range(len(pairs))]

    def _row(
        self, example: Example, pieces: list[_Piece], counts: EncodedRow, tokens: Iterator[_Ids], hold_out: bool
    ) -> EncodedRow | InvalidRow:
        fitted: list[Encoded] = []
        problems: list[InvalidRow] = []
        last = True  # pieces begin with the one of the last turn
        for piece in pieces:
            for group in _joined([next(tokens) for _ in piece.turns], piece.everything):
                made = self._fit(example, group, piece, hold_out=hold_out and last)
                (problems if isinstance(made, InvalidRow) else fitted).append(made)  # type: ignore[arg-type]
                last = False
        if not fitted:
            return problems[0]
        if problems:
            self.notices[f"some turns of a row are left out: {problems[0].reason}"] += 1
        return replace(counts, examples=tuple(reversed(fitted)))

    def _fit(self, example: Example, group: _Group, piece: _Piece, *, hold_out: bool) -> Encoded | InvalidRow:
        ids, trained, first = group.ids, group.trained, group.first
        if not piece.chat and ids[-1] != self._tokens.eos:
            ids, trained = [*ids, self._tokens.eos], np.append(trained, True)
        most = self.max_length
        if len(ids) > most and not self.cuts:
            return InvalidRow(TOO_LONG, f"{len(ids)} tokens, more than training.max_length={most}")
        if not trained[:most].any():
            return InvalidRow(CUT_OFF, f"its answer begins beyond training.max_length={most}")
        held_out = None
        if hold_out and 0 < first < most and (example.messages or example.prompt is not None):
            answer = self._dialogue.judged(ids[first:], ids[:first], chat=piece.chat)
            held_out = HeldOut(example.place, tuple(ids[:first]), example.question, answer)
        return Encoded(example.place, np.asarray(ids[:most], dtype=np.int32), trained[:most].copy(), held_out)


@dataclass(frozen=True, slots=True)
class _Group:
    """Turns in one example: its ids, what is trained of them, and where the last answer begins."""

    ids: list[int]
    trained: NDArray[np.bool_]
    first: int


def _piece(turns: Sequence[Turn], everything: bool) -> _Piece:
    return _Piece(tuple((turn.prompt, turn.target) for turn in turns), chat=True, everything=everything)


def _joined(turns: Sequence[_Ids], everything: bool) -> Iterator[_Group]:
    """The last turn's example, with each earlier turn in it whose tokens stand there too; then the others' own."""
    rest = list(turns)
    while rest:
        prompt, answer = rest.pop()
        ids = prompt + answer
        trained = np.full(len(ids), everything)
        trained[len(prompt) :] = True
        left = []
        for before, said in rest:
            place = slice(len(before), len(before) + len(said))
            if ids[: place.start] == before and ids[place] == said:
                trained[place] = True
            else:
                left.append((before, said))
        rest = left
        yield _Group(ids, trained, len(prompt))


def pack_row(row: EncodedRow) -> tuple[Any, ...]:
    """The row as tuples, text and bytes."""
    examples = [
        (each.place, each.ids.tobytes(), each.trained.tobytes(), each.held_out, each.desirable) for each in row.examples
    ]
    return (examples, row.turns, row.thoughts, row.dropped_thoughts, row.enders)


def unpack_row(stored: tuple[Any, ...]) -> EncodedRow:
    """The row that `pack_row` was given."""
    examples, *counts = stored
    return EncodedRow(
        tuple(
            Encoded(place, np.frombuffer(ids, dtype=np.int32), np.frombuffer(trained, dtype=np.bool_), *rest)
            for place, ids, trained, *rest in examples
        ),
        *counts,
    )
