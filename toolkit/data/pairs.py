"""Preference rows: one prompt with an answer that is chosen and one that is rejected, or with one that is called good
or bad.

TRL finds an unwritten prompt of texts by their first characters that agree, in the middle of a word if need be, cuts
long pairs until both sides may be equal, and trains what stands behind the token that ends an answer. Here each side is
an example like any other, read and written by the same law, and the two must have the same prompt and differ after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from toolkit.data.conversation import Message, check_messages
from toolkit.data.encode import Encoded, EncodedRow, Encoder
from toolkit.data.formats import CHAT, SHAPES, Example, Shape, carries, conversation, present, text_column
from toolkit.data.problems import InvalidRow
from toolkit.data.speakers import as_turns, turns_in

__all__ = ["EQUAL_WHEN_CUT", "JUDGED_SHAPES", "PAIRS", "PAIR_SHAPES", "UNPAIRED", "encode_examples"]

PAIRS, UNPAIRED = "preference", "unpaired"
"""The formats' names."""
_WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
EQUAL_WHEN_CUT = "chosen and rejected are the same up to max_length"
_SIDES = ("chosen", "rejected")


def encode_examples(
    encoder: Encoder, examples: Sequence[Example], *, hold_out: bool = False
) -> list[EncodedRow | InvalidRow]:
    """As `Encoder.encode`; of a pair the row's two examples are the chosen and the rejected answer, and nobody is asked
    for an answer that is called bad."""
    if any(example.desirable is not None for example in examples):
        return _judged(encoder, examples, hold_out)
    if not any(example.rejected for example in examples):
        return encoder.encode(examples, hold_out=hold_out)
    chosen = encoder.encode([replace(example, rejected=None) for example in examples], hold_out=hold_out)
    rejected = encoder.encode([replace(e.rejected, place=e.place) for e in examples if e.rejected is not None])
    return [_joined(encoder, *each) for each in zip(examples, chosen, rejected, strict=True)]


def _judged(encoder: Encoder, examples: Sequence[Example], hold_out: bool) -> list[EncodedRow | InvalidRow]:
    good = iter(encoder.encode([example for example in examples if example.desirable], hold_out=hold_out))
    bad = iter(encoder.encode([example for example in examples if not example.desirable]))
    found: list[EncodedRow | InvalidRow] = []
    for example in examples:
        row = next(good if example.desirable else bad)
        row = row if isinstance(row, InvalidRow) else _of_one_text(row, "")
        if isinstance(row, EncodedRow):
            row = replace(row, examples=(replace(row.examples[0], desirable=example.desirable),))
        found.append(row)
    return found


def _of_one_text(row: EncodedRow, side: str) -> EncodedRow | InvalidRow:
    """The row, or why not, where its answers do not stand in one text."""
    if len(row.examples) == 1:
        return row
    return InvalidRow(
        "answers that one text does not hold",
        f"{side}the chat template writes its answers in {len(row.examples)} different texts; give one answer",
    )


def _joined(
    encoder: Encoder, example: Example, chosen: EncodedRow | InvalidRow, rejected: EncodedRow | InvalidRow
) -> EncodedRow | InvalidRow:
    for side, row in zip(_SIDES, (chosen, rejected), strict=True):
        if isinstance(row, InvalidRow):
            return InvalidRow(row.reason, f"{side}: {row.detail}")
        if isinstance(problem := _of_one_text(row, f"{side}: "), InvalidRow):
            return problem
    assert isinstance(chosen, EncodedRow)
    assert isinstance(rejected, EncodedRow)
    one, other = chosen.examples[0], rejected.examples[0]
    if not np.array_equal(_prompt(one), _prompt(other)):
        return InvalidRow("different prompts", "the chat template writes the prompt otherwise for chosen and rejected")
    if np.array_equal(one.ids, other.ids):
        assert example.rejected is not None
        same = replace(example, rejected=None).identity == example.rejected.identity
        if encoder.cuts and len(one.ids) == encoder.max_length and not same:
            return InvalidRow(EQUAL_WHEN_CUT, f"chosen and rejected are the same up to {encoder.max_length} tokens")
        how = "" if same else "as the chat template writes them, "
        return InvalidRow("chosen is rejected", f"{how}chosen and rejected are the same; there is nothing to prefer")
    return EncodedRow(
        (one, other),
        turns=chosen.turns + rejected.turns,
        thoughts=chosen.thoughts + rejected.thoughts,
        dropped_thoughts=chosen.dropped_thoughts + rejected.dropped_thoughts,
        enders=(*chosen.enders, *rejected.enders),
    )


def _prompt(example: Encoded) -> Any:
    """Ids before the first one that counts."""
    return example.ids[: int(example.trained.argmax())]


def _parse(values: Mapping[str, Any]) -> Example:
    sides = {side: [said] if isinstance(said := present(values, side), dict) else said for side in _SIDES}
    values, prompt = {**values, **sides}, values.get("prompt")
    texts = [_is_text(answer) for answer in sides.values()]
    if all(texts):
        return _text_pair(values)
    if any(texts):
        raise InvalidRow("mixed pair", "prompt, chosen and rejected must all be text, or all lists of messages")
    answers = [check_messages(as_turns(values[side], side), side) for side in _SIDES]
    given = _asked(prompt, answers)
    cut = [answer[len(given) :] if answer[: len(given)] == given else answer for answer in answers]
    for side, answer in zip(_SIDES, cut, strict=True):
        if answer and answer[0]["role"] != "assistant":
            raise InvalidRow(
                "different prompts",
                f"{side}: after the prompt comes a turn of {answer[0]['role']}, not the assistant's answer; chosen and "
                "rejected must have one prompt",
            )
        if not answer:
            raise InvalidRow("no assistant turn", f"{side}: no answer after the prompt; there is nothing to prefer")
    one, other = (conversation(values, [*given, *answer], given=len(given)) for answer in cut)
    return replace(one, rejected=other)


def _asked(prompt: Any, answers: Sequence[list[Message]]) -> list[Message]:
    """The prompt of two conversations: as it is given, or what both begin with up to the answer that differs."""
    if not carries(prompt):
        shared = next((n for n, (one, other) in enumerate(zip(*answers, strict=False)) if one != other), None)
        shared = min(map(len, answers)) if shared is None else shared
        begins = answers[0][:shared]
        while begins and begins[-1]["role"] == "assistant":  # an answer that both have begins the answers
            begins = begins[:-1]
        if not begins:
            raise InvalidRow("no prompt", "chosen and rejected have no turn in common; add a prompt")
        return begins
    if _is_text(prompt):
        asked: Message = {"role": "user", "content": prompt}
        whole = all(answer[0]["role"] != "assistant" for answer in answers)
        if not whole:
            return [asked]
        begins = _asked(None, answers)
        if not any(turn["role"] == "user" and turn.get("content") == prompt for turn in begins):
            raise InvalidRow("different prompts", "chosen and rejected begin with another turn than the prompt")
        return begins
    return check_messages(as_turns(prompt, "prompt"), "prompt")


def _text_pair(values: Mapping[str, Any]) -> Example:
    if not carries(values.get("prompt")):
        raise InvalidRow("no prompt", "no prompt; of two texts nobody can tell where the answers begin")
    if not _is_text(values["prompt"]):
        raise InvalidRow("mixed pair", "prompt, chosen and rejected must all be text, or all lists of messages")
    prompt = text_column(values, "prompt")
    if chat := next((name for name in CHAT if carries(values.get(name))), None):
        raise InvalidRow("plain text", f"plain text has no place for {chat}; make prompt, chosen and rejected messages")
    answers = [text_column(values, side) for side in _SIDES]
    for side, answer in zip(_SIDES, answers, strict=True):
        if not answer.strip():
            raise InvalidRow("empty answer", f"{side} is empty; there is nothing to prefer")
    one, other = (Example("", prompt=prompt, text=prompt + answer) for answer in answers)
    return replace(one, rejected=other)


def _is_text(value: Any) -> bool:
    """Whether a value is text that is no list of messages in JSON, as CSV holds one."""
    if not isinstance(value, str):
        return False
    found = turns_in(value)
    return not (isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found))


def _parse_unpaired(values: Mapping[str, Any]) -> Example:
    label = present(values, "label")
    word = _WORDS.get(str(label).strip().lower()) if isinstance(label, (str, bool, int, float)) else None
    if word is None:
        raise InvalidRow(
            "bad label", f"label is {label!r}; true (a good answer) or false (a bad one) is expected"[:200]
        )
    return replace(SHAPES["prompt-completion"].parse(values), desirable=word)


PAIR_SHAPES: Mapping[str, Shape] = {PAIRS: Shape(("chosen", "rejected"), ("prompt", *CHAT), _parse)}
"""The formats of preference rows by name."""
JUDGED_SHAPES: Mapping[str, Shape] = {
    **PAIR_SHAPES,
    UNPAIRED: Shape(("prompt", "completion", "label"), CHAT, _parse_unpaired),
}
"""The same, and rows of single answers that are called good or bad."""
