"""Rows as services and other trainers write them, under our columns: the same conversation and answers by other names.

A row in no such form stays as it is. What stands beside keeps its name, and is judged like any other column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from toolkit.data.parts import turn_of_gemini
from toolkit.data.problems import InvalidRow
from toolkit.data.speakers import role_of, turns_in

__all__ = ["advice", "instructed", "unwrapped"]

Values = Mapping[str, Any]
_CONVERSATIONS = ("messages", "conversations")
_SYSTEM = ("systemInstruction", "system_instruction")


def unwrapped(values: Values, *, pairs: bool, judged: bool) -> Values:
    """The row under our columns.

    Args:
        values: its columns.
        pairs: whether rows may be a better and a worse answer.
        judged: whether rows may be one answer that is called good or bad.

    Raises:
        InvalidRow: a conversation of Gemini's that is none.
    """
    turns = values.get("contents")
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "parts" in turn for turn in turns):
        values = _of_gemini(values, turns)
    if pairs and (found := _of_openai(values) or _with_rejected(values) or _beside_question(values)):
        return found
    return (judged and _with_label(values)) or values


def _of_gemini(values: Values, turns: Sequence[Any]) -> Values:
    found = _without(values, "contents", *_SYSTEM)
    found["messages"] = [turn_of_gemini(turn, f"contents[{index}]") for index, turn in enumerate(turns)]
    for name in _SYSTEM:
        if told := values.get(name):
            found["system"] = turn_of_gemini(told, name)["content"] if isinstance(told, dict) else told
    return found


def _of_openai(values: Values) -> Values | None:
    """A pair as OpenAI's preference tuning reads it."""
    asked = values.get("input")
    names = ("preferred_output", "non_preferred_output")
    if not isinstance(asked, dict) or "messages" not in asked or not values.keys() >= set(names):
        return None
    beside = _without(asked, "messages")
    if twice := beside.keys() & values.keys():
        raise InvalidRow("bad messages", f"input: {min(twice)} stands in it and beside it; keep one")
    rest = _without(values, "input", *names)
    return {**rest, **beside, "prompt": asked["messages"], "chosen": values[names[0]], "rejected": values[names[1]]}


def _with_rejected(values: Values) -> Values | None:
    """A conversation whose last answer is the better one, beside the worse one, as ms-swift reads it."""
    turns = turns_in(values.get("messages"))
    if "chosen" in values or not isinstance(turns, list) or not turns:
        return None
    if isinstance(worse := turns_in(values.get("rejected_messages")), list) and worse:
        return {**_without(values, "messages", "rejected_messages"), "chosen": turns, "rejected": worse}
    answer = values.get("rejected_response")
    if not isinstance(answer, str) or not answer or role_of(turns[-1]) != "assistant":
        return None
    rejected = [{"role": "assistant", "content": answer}]
    rest = _without(values, "messages", "rejected_response")
    return {**rest, "prompt": turns[:-1], "chosen": turns[-1:], "rejected": rejected}


def _beside_question(values: Values) -> Values | None:
    """Two answers beside what they answer: a conversation, as Axolotl and LLaMA-Factory read it, or an instruction."""
    sides = [values.get(side) for side in ("chosen", "rejected")]
    is_answer = [isinstance(side, dict) or (isinstance(side, str) and side == turns_in(side)) for side in sides]
    if values.get("prompt") or not all(is_answer):
        return None
    name, turns = _conversation(values)
    if name and role_of((turns or [None])[-1]) != "assistant":
        rest, prompt = _without(values, name), turns
    elif isinstance(asked := values.get("instruction"), str) and not values.get("history"):
        rest = _without(values, "instruction", "input")
        prompt = [{"role": "user", "content": instructed(asked, values.get("input"))}]
    else:
        return None
    answers = [side if isinstance(side, dict) else {"role": "assistant", "content": side} for side in sides]
    return {**rest, "prompt": prompt, "chosen": answers[:1], "rejected": answers[1:]}


def instructed(instruction: str, given: Any) -> str:
    """Alpaca's question: an instruction, and what it is about below it."""
    return f"{instruction}\n\n{given}" if given else instruction


def _with_label(values: Values) -> Values | None:
    """A conversation whose last answer is called good or bad."""
    mark = next((name for name in ("label", "kto_tag") if values.get(name) is not None), None)
    name, turns = _conversation(values)
    if mark is None or not name or not {"prompt", "completion"}.isdisjoint(values):
        return None
    last = max((at for at, turn in enumerate(turns) if role_of(turn) == "assistant"), default=None)
    if last is None:
        return None
    return {**_without(values, name, mark), "prompt": turns[:last], "completion": turns[last:], "label": values[mark]}


def _conversation(values: Values) -> tuple[str, list[Any]]:
    """The column that a conversation stands in, and its turns; an empty name where there is none."""
    for name in _CONVERSATIONS:
        if isinstance(turns := turns_in(values.get(name)), list):
            return name, turns
    return "", []


def _without(values: Values, *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def advice(columns: Set[str]) -> str:
    """What to do with rows of these columns, where they are known and fit no format; nothing where they are not."""
    return next((f"; {told}" for known, told in _KNOWN if any(columns >= names for names in known)), "")


_KNOWN = (
    (
        ({"custom_id"},),
        "rows are questions or answers of a batch, each without the other: join both files by custom_id into rows of "
        "messages",
    ),
    (({"choices"},), "rows are answers of an API without their questions: write both as messages"),
    (
        ({"chosen", "rejected"}, {"preferred_output", "non_preferred_output"}),
        "rows are a better and a worse answer: learn from both with training.method: dpo, or keep one of them",
    ),
)
"""Columns by which such rows are known, and what to do."""
