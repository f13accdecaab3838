"""The data set of a run: read, judge, split, encode, refuse what cannot be learnt from, and report.

Examples are tokenised in the order in which they are drawn, so that `max_samples` of a large set costs that many.
Packing is TRL's: it is given rows of `input_ids` and `labels` and no text.
"""

from __future__ import annotations

import datetime
import itertools
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import numpy as np
from numpy.typing import NDArray

from toolkit.data.dialogue import ChatForm, Dialogue
from toolkit.data.encode import CUT_OFF, TOO_LONG, Encoded, EncodedRow, Encoder, HeldOut, pack_row, unpack_row
from toolkit.data.formats import SHAPES, Example
from toolkit.data.pairs import EQUAL_WHEN_CUT, JUDGED_SHAPES, PAIR_SHAPES, PAIRS, encode_examples
from toolkit.data.problems import Problems
from toolkit.data.questions import QUESTION_SHAPES, Question, QuestionEncoder, Questions
from toolkit.data.reading import Reading, Split, counted, read_sources, require_removed, sources_of
from toolkit.data.report import DataReport, SourceReport, SplitReport, source_reports, summarise
from toolkit.data.selection import (
    BEYOND,
    COPIES,
    HELD,
    copies,
    draw,
    drop_copies,
    drop_held_out,
    group_overlap,
    overlap,
    set_apart,
)
from toolkit.data.sources import open_source
from toolkit.data.storage import Spool, View, token_table
from toolkit.errors import DataError
from toolkit.steps import advance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batches", "build_batches"]

_CHUNK = 512
_UNSEEN, _UNUSABLE = -2, -1
_REPEATED = "examples repeated by the weights of data.train"
_REMEDIES = {
    TOO_LONG: "; raise training.max_length or set data.truncation: keep_start",
    CUT_OFF: "; raise training.max_length",
    EQUAL_WHEN_CUT: "; raise training.max_length",
    HELD: "; hold out less, or set data.dedupe: false",
}


@dataclass(frozen=True)
class Batches:
    """Masked examples, not packed yet: columns `input_ids` and `labels`, both (T,), IGNORED where not trained.

    Of pairs, rows 2n and 2n+1 are the chosen and the rejected answer of pair n, and a label is what counts. Of answers
    that are called good or bad one by one, a column `desirable` says it.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    held_out: Sequence[HeldOut]
    report: DataReport
    form: ChatForm = field(default_factory=ChatForm)
    """How inference asks for what was trained, and where it stops."""
    places: Sequence[str] = ()
    """Where each row of `train` came from, `file:line`."""
    questions: Sequence[Question] = ()
    """What each row of `train` asks, where the model writes answers to it; and of `validation`."""
    held_out_questions: Sequence[Question] = ()

    @property
    def pairs(self) -> bool:
        """Whether the rows are pairs."""
        return self.report.pairs

    @property
    def judged(self) -> bool:
        """Whether answers are called good or bad, in pairs or one by one."""
        return self.report.judged


@dataclass(frozen=True)
class _Done:
    """One split, encoded: `rows[i]` are the tokens of `examples[i]`."""

    examples: Sequence[Example]
    rows: Sequence[EncodedRow]
    summary: SplitReport
    copies: int
    repeated: int
    """Examples more than there would be without weights."""

    @property
    def encoded(self) -> Iterator[Encoded]:
        """All examples, in the order of their rows."""
        return (each for row in self.rows for each in row.examples)


def build_batches(
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: str | Sequence[Mapping[str, Any]],
    validation: str | None = None,
    validation_size: float | int | None = None,
    name: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    format: Literal[
        "auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text", "preference", "unpaired", "prompt"
    ] = "auto",
    columns: Mapping[str, str] = {},
    system_prompt: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] = {},
    thoughts: Literal["keep", "drop"] = "keep",
    train_on: Literal["all", "last"] = "all",
    assistant_only_loss: bool = True,
    completion_only_loss: bool = True,
    truncation: Literal["drop", "keep_start"] = "drop",
    on_invalid: Literal["error", "drop"] = "error",
    max_samples: int | None = None,
    shuffle: bool = True,
    remove_columns: Sequence[str] = (),
    dedupe: bool = False,
    group_by: str | None = None,
    max_length: int = 1024,
    seed: int = 42,
    base_folder: Path = Path("."),
    stop_token_ids: Sequence[int] = (),
    date: datetime.date | None = None,
    pairs: bool = False,
    unpaired: bool = False,
    room: int | None = None,
    kept: Sequence[str] = (),
) -> Batches:
    """Read, check and mask the data of a run; the same arguments and files always give the same batches.

    The arguments are the fields of the recipe's data section, but `chat_template` is Jinja text (see
    `read_chat_template`), `max_length` is in tokens, and relative paths start at `base_folder`. `stop_token_ids` are
    those at which the checkpoint's own generation stops, and `date` is what the chat template prints as today's. With
    `pairs`, rows are preference pairs; with `unpaired` they may be single answers that are called good or bad. With
    `room`, tokens that the model writes to a prompt, rows are questions, which carry the columns `kept` for rewards.
    The tokenizer must be a fast one; it is not changed. Turns after a conversation's last answer are left out and
    counted.

    Raises:
        DataError: the data cannot be read, an example is invalid (and `on_invalid` is "error"), or nothing is left.
    """
    if sum(given is not None for given in (validation, validation_size, validation_split)) > 1:
        raise DataError("data: validation, validation_size and validation_split exclude each other; keep one")
    shapes = JUDGED_SHAPES if unpaired else PAIR_SHAPES if pairs else QUESTION_SHAPES if room else SHAPES
    reading = Reading(format, columns, system_prompt, on_invalid, remove_columns, group_by, shapes, kept)
    sources = sources_of(train, name, train_split)
    training = read_sources(sources, reading, base_folder)
    require_removed(reading, training.where)
    if dedupe:
        drop_copies(training)
    held = None
    if validation is not None:
        rows = open_source(validation, name=name, default="validation", base_folder=base_folder)
        held = reading.read("validation", validation, rows)
    elif validation_split is not None:
        held = read_sources(sources, reading, base_folder, name="validation", split=validation_split)
    elif validation_size is not None:
        held = set_apart(training, validation_size, seed)
    if unpaired:
        _refuse_mixture(training, held, reading.found)
    if dedupe and held is not None:
        drop_held_out(training, held)
    chat = any(example.messages for example in training.examples)
    form = ChatForm(
        form="chat" if chat else "text",
        stop_token_ids=tuple(stop_token_ids),
        chat_template_kwargs=dict(chat_template_kwargs),
        date=(date or datetime.date.today()).isoformat() if chat else "",
        system_prompt=system_prompt,
    )
    dialogue = Dialogue(tokenizer, form, chat_template=chat_template, thoughts=thoughts)
    encoder = (partial(QuestionEncoder, room=room) if room else Encoder)(
        tokenizer,
        dialogue,
        train_on=train_on,
        assistant_only_loss=assistant_only_loss,
        completion_only_loss=completion_only_loss,
        truncation=truncation,
        max_length=max_length,
    )
    drawn, not_drawn = draw(training.examples, sources, seed)
    training.drops += not_drawn
    order = _order(len(drawn), drawn=shuffle or max_samples is not None, seed=seed)
    done = _encode(training, encoder, on_invalid, drawn, order, most=max_samples, keep_order=not shuffle)
    if room is None or done.summary.trained_tokens:
        _refuse_endless(done, training.where, dialogue)
    held_done = None
    if held is not None:
        every = np.arange(len(held.examples))
        held_done = _encode(held, encoder, on_invalid, every, every, hold_out=True)
        if group_by is not None:
            on_both = group_overlap(done.examples, held_done.examples)
            reading.notices[f"held-out examples whose {group_by} is also in the training data"] += on_both
    reading.notices[COPIES] += 0 if dedupe else done.copies
    reading.notices[_REPEATED] += done.repeated
    told = source_reports(sources, training, done.examples, done.rows) if not isinstance(train, str) else ()
    made = _batches(done, held_done, reading.found, reading.notices + encoder.notices, dialogue.form, told)
    if room is None:
        return made
    held_out = Questions(held_done.examples, held_done.rows) if held_done else ()
    return replace(made, questions=Questions(done.examples, done.rows), held_out_questions=held_out)


def _refuse_mixture(training: Split, held: Split | None, found: str) -> None:
    """Refuse pairs beside answers that are judged one by one: a batch is of one kind."""
    kinds = {split.examples[0].rejected is None for split in (training, held) if split is not None}
    if len(kinds) > 1 or ", " in found:
        raise DataError(f"{training.where}: pairs and answers that are judged one by one; give rows of one format")


def _order(count: int, *, drawn: bool, seed: int) -> NDArray[np.int64]:
    # A stream of its own: the held-out groups are drawn with the bare seed.
    return np.random.default_rng((seed, 1)).permutation(count) if drawn else np.arange(count)


def _encode(
    split: Split,
    encoder: Encoder,
    on_invalid: Literal["error", "drop"],
    drawn: NDArray[np.int64],
    order: NDArray[np.int64],
    *,
    most: int | None = None,
    keep_order: bool = False,
    hold_out: bool = False,
) -> _Done:
    """Encode the examples `drawn` of `split`, in the `order` of their places in it, until `most` are kept.

    One that is drawn again is encoded once.
    """
    problems, drops = Problems(), Counter(split.drops)
    rows = Spool[EncodedRow](_memory_of, pack=pack_row, unpack=unpack_row)
    number = np.full(len(split.examples), _UNSEEN, dtype=np.int64)  # of each example in `rows`
    places = array("q")  # in `drawn`, of those that are kept
    seen = distinct = 0
    while seen < len(order) and (most is None or len(places) < most):
        chunk = order[seen : seen + min(_CHUNK, most - len(places) if most else _CHUNK)]
        seen += len(chunk)
        advance(seen, len(order), "examples")
        fresh = [index for index in dict.fromkeys(drawn[chunk].tolist()) if number[index] == _UNSEEN]
        encoded = encode_examples(encoder, [split.examples[index] for index in fresh], hold_out=hold_out)
        for index, result in zip(fresh, encoded, strict=True):
            number[index] = len(rows) if isinstance(result, EncodedRow) else _UNUSABLE
            if isinstance(result, EncodedRow):
                rows.append(result)
                distinct += len(result.examples)
            elif result.reason in (TOO_LONG, CUT_OFF, EQUAL_WHEN_CUT):
                drops[result.reason] += 1
            else:
                problems.add(index, split.examples[index].place, result)
        places.extend(chunk[number[drawn[chunk]] != _UNUSABLE].tolist())
    problems.settle(on_invalid, split.rows)
    drops += problems.reasons
    if seen < len(order):
        drops[BEYOND] += int((number[np.unique(drawn)] == _UNSEEN).sum())
    if not places:
        left = f"no example left for {split.name} of {split.rows} rows ({counted(drops)})"
        chief = max(drops, key=lambda reason: drops[reason], default="")
        raise DataError(f"{split.where}: {left}{_REMEDIES.get(chief, problems.advice)}")
    kept = drawn[np.sort(places) if keep_order else np.asarray(places)]
    kept_rows = View(rows, number[kept])
    summary = summarise(split.rows, kept_rows, drops)
    is_paired = bool(split.examples[0].rejected)
    again = copies(unit for row in rows for unit in ([row.examples] if is_paired else zip(row.examples)))
    repeated = (summary.examples - distinct) // (2 if is_paired else 1)
    return _Done(View(split.examples, kept), kept_rows, summary, again, repeated)


def _memory_of(row: EncodedRow) -> int:
    return 300 + sum(each.ids.nbytes + each.trained.nbytes for each in row.examples)


def _refuse_endless(done: _Done, where: str, dialogue: Dialogue) -> None:
    """Refuse a data set in which every answer is cut before the token that would teach the model to stop."""
    enders = dialogue.form.stop_token_ids
    if not any(np.isin(each.ids[each.trained], enders).any() for each in done.encoded):
        raise DataError(f"{where}: every answer is cut before its end-of-turn token; raise training.max_length")


def _batches(
    done: _Done,
    held: _Done | None,
    found: str,
    notices: Mapping[str, int],
    form: ChatForm,
    sources: tuple[SourceReport, ...],
) -> Batches:
    splits = {"train": done.summary} | ({"validation": held.summary} if held else {})
    first = [each.place for each in itertools.islice(done.encoded, 6)]
    report = DataReport(
        format=found,
        splits=splits,
        overlap=overlap(done.examples, held.examples) if held else 0,
        notices={text: n for text, n in sorted(notices.items()) if n},
        examples=tuple(first[::2] if found == PAIRS else first[:3]),
        sources=sources,
    )
    train, places = token_table(done.encoded, done.summary.tokens)
    validation = token_table(held.encoded, held.summary.tokens)[0] if held else None
    return Batches(train, validation, _questions(held), report, form, places)


def _questions(held: _Done | None) -> Sequence[HeldOut]:
    found = Spool[HeldOut](lambda question: len(question.prompt_text) + 40 * len(question.prompt_ids))
    for each in held.encoded if held else ():
        if each.held_out:
            found.append(each.held_out)
    return found
