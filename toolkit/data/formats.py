"""Rows to examples: the five shapes that fine-tuning data comes in, told apart by their columns.

TRL and datasets guess the shape of a data set too, but drop what does not fit without naming a row; here the shape is
decided once, from the columns, and every row is held to it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.data.conversation import Message, check_messages, check_tools, text_of, trim
from toolkit.data.problems import InvalidRow, listed, printable
from toolkit.errors import DataError, did_you_mean

__all__ = ["SHAPES", "Example", "Shape", "add_system", "choose_shape", "rename"]

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class Example:
    """One valid example: a conversation (`messages`), or text of which `prompt` is the part not to be trained."""

    place: str
    messages: tuple[Message, ...] = ()
    tools: list[dict[str, Any]] | None = None
    given: int = 0
    """Leading messages that belong to the prompt of a prompt/completion pair."""
    prompt: str | None = None
    text: str = ""
    trimmed: bool = False
    """Turns after the last answer were left out."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The row's own options for the chat template."""

    @property
    def key(self) -> bytes:
        """A hash of everything before the last answer, 16 bytes: examples that share it must not be held apart."""
        if self.messages:
            asked = json.dumps([self.messages[:-1], self.tools], sort_keys=True, default=str)
        else:
            asked = self.text if self.prompt is None else self.prompt
        return hashlib.blake2b(asked.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest()

    @property
    def question(self) -> str:
        """The last user turn before the answer, or the prompt."""
        asked = [text_of(turn.get("content")) for turn in self.messages[:-1] if turn["role"] == "user"]
        return asked[-1] if asked else (self.prompt or "")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a format's rows must and may hold, and how one becomes an example (its place is filled in later)."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Example]


def choose_shape(declared: str, columns: Set[str], renamed: Mapping[str, str], where: str) -> str:
    """The format of a file with these columns.

    Args:
        declared: a format's name, or `auto`.
        columns: the file's own column names.
        renamed: our column to the file's column.
        where: the file, for messages.

    Raises:
        DataError: a renaming names no column, the columns fit no format, or not the declared one.
    """
    ours = sorted({name for shape in SHAPES.values() for name in (*shape.required, *shape.optional)})
    for our, theirs in renamed.items():
        if our not in ours:
            raise DataError(
                f"data.columns: {our}: not a column of ours{did_you_mean(our, ours)}; known: {listed(ours)}"
            )
        if theirs not in columns:
            near = did_you_mean(theirs, sorted(map(printable, columns)))
            raise DataError(f"{where}: data.columns: no column {theirs!r}{near}; it has {listed(sorted(columns))}")
    available = columns | renamed.keys()
    fitting = [name for name, shape in SHAPES.items() if available.issuperset(shape.required)]
    if declared == "auto" and fitting:
        return fitting[0]
    if declared in fitting:
        return declared
    wanted = SHAPES if declared == "auto" else {declared: SHAPES[declared]}
    raise DataError(_no_fit(declared, wanted, set(map(printable, columns)), available, where))


def rename(values: Mapping[str, Any], renamed: Mapping[str, str]) -> Mapping[str, Any]:
    """`values` under our column names."""
    return {**values, **{our: values[theirs] for our, theirs in renamed.items() if theirs in values}}


def add_system(example: Example, system_prompt: str | None) -> Example:
    """`example` with `system_prompt` as its first turn, unless it has a system turn."""
    if system_prompt is None or any(turn["role"] == "system" for turn in example.messages):
        return example
    messages = ({"role": "system", "content": system_prompt}, *example.messages)
    return replace(example, messages=messages, given=example.given + 1 if example.given else 0)


def _no_fit(declared: str, wanted: Mapping[str, Shape], columns: Set[str], available: Set[str], where: str) -> str:
    choices = " | ".join(f"{name}: {', '.join(shape.required)}" for name, shape in wanted.items())
    has = listed(sorted(columns)) or "nothing"
    if declared != "auto":
        missing = [name for name in wanted[declared].required if name not in available]
        hint = did_you_mean(missing[0], sorted(columns))
        example = f"{{{missing[0]}: {_example_column(missing[0], columns)}}}"
        needs = f"the format {declared} needs {', '.join(wanted[declared].required)}"
        return f"{where}: no column {missing[0]!r}{hint}; it has {has}; {needs}; rename with data.columns: {example}"
    names = sorted({name for shape in wanted.values() for name in shape.required})
    near = [
        (theirs, ours[0]) for theirs in sorted(columns) if (ours := difflib.get_close_matches(theirs, names, 1, 0.8))
    ]
    hint = f"; is {near[0][0]!r} meant to be {near[0][1]!r}?" if near else ""
    return f"{where}: its columns ({has}) fit no format{hint}; accepted: {choices}; rename with data.columns"


def _example_column(missing: str, columns: Set[str]) -> str:
    near = difflib.get_close_matches(missing, sorted(columns), n=1)
    return near[0] if near else min(columns, default="your_column")


def _text_of(values: Mapping[str, Any], column: str) -> str:
    value = values.get(column)
    if value is None:
        raise InvalidRow("missing column", f"no {column}; the row has {listed(map(str, values)) or 'nothing'}")
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InvalidRow("not text", f"{column} is a {kind}; text is expected")
    return value


def _present(values: Mapping[str, Any], column: str) -> Any:
    if values.get(column) is None:
        raise InvalidRow("missing column", f"no {column}; the row has {listed(map(str, values)) or 'nothing'}")
    return values[column]


def _conversation(messages: list[Message], tools: Any, given: int = 0) -> Example:
    kept = trim(messages)
    if len(kept) <= given:
        raise InvalidRow("no assistant turn", "no assistant turn in the completion; there is nothing to learn from")
    tools = check_tools(tools)
    return Example("", messages=tuple(kept), tools=tools, given=given, trimmed=len(kept) < len(messages))


def _parse_messages(values: Mapping[str, Any]) -> Example:
    return _conversation(check_messages(_present(values, "messages")), values.get("tools"))


def _parse_sharegpt(values: Mapping[str, Any]) -> Example:
    raw = _present(values, "conversations")
    raw = json.loads(raw) if isinstance(raw, str) and raw.lstrip().startswith("[") and _is_json(raw) else raw
    turns = [_speaker(turn) for turn in raw] if isinstance(raw, list) else raw
    messages = check_messages(turns, "conversations")
    if values.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text_of(values, "system")}, *messages]
    return _conversation(messages, values.get("tools"))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _speaker(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    speaker = turn["from"]
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        near = did_you_mean(str(speaker), list(_SPEAKERS)) or f"; known: {', '.join(_SPEAKERS)}"
        raise InvalidRow("unknown role", f"conversations: unknown speaker {ascii(speaker)[:40]}{near}")
    return {"role": role, "content": turn.get("value")}


def _parse_pair(values: Mapping[str, Any]) -> Example:
    prompt, completion = _present(values, "prompt"), _present(values, "completion")
    if isinstance(prompt, list) != isinstance(completion, list):
        raise InvalidRow("mixed pair", "prompt and completion must both be text or both be lists of messages")
    if isinstance(prompt, list):
        given = check_messages(prompt, "prompt")
        return _conversation([*given, *check_messages(completion, "completion")], values.get("tools"), given=len(given))
    prompt, completion = _text_of(values, "prompt"), _text_of(values, "completion")
    if not completion.strip():
        raise InvalidRow("empty answer", "completion is empty; there is nothing to learn from")
    return Example("", prompt=prompt, text=prompt + completion)


def _parse_alpaca(values: Mapping[str, Any]) -> Example:
    asked = _text_of(values, "instruction")
    if values.get("input"):
        asked = f"{asked}\n\n{_text_of(values, 'input')}"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": _text_of(values, "output")}]
    if values.get("system"):
        messages.insert(0, {"role": "system", "content": _text_of(values, "system")})
    return _conversation(messages, None)


def _parse_text(values: Mapping[str, Any]) -> Example:
    text = _text_of(values, "text")
    if not text.strip():
        raise InvalidRow("empty text", "text is empty; there is nothing to learn from")
    return Example("", text=text)


SHAPES: Mapping[str, Shape] = {
    "messages": Shape(("messages",), ("tools",), _parse_messages),
    "sharegpt": Shape(("conversations",), ("system", "tools"), _parse_sharegpt),
    "prompt-completion": Shape(("prompt", "completion"), ("tools",), _parse_pair),
    "alpaca": Shape(("instruction", "output"), ("input", "system"), _parse_alpaca),
    "text": Shape(("text",), (), _parse_text),
}
"""Every format by name, in the order in which `auto` tries them."""
