"""Rows to examples: the five shapes that fine-tuning data comes in, told apart by their columns.

TRL and datasets guess the shape of a data set too, but drop what does not fit without naming a row; here the shape is
decided once, from the columns, and every row is held to it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.data.conversation import Message, check_messages, text_of, trim
from toolkit.data.envelopes import advice, instructed
from toolkit.data.problems import JSON, InvalidRow, listed, printable
from toolkit.data.speakers import as_turns
from toolkit.data.template import NOT_OPTIONS
from toolkit.data.tools import tools_in
from toolkit.errors import DataError, did_you_mean

__all__ = [
    "CHAT",
    "SHAPES",
    "Example",
    "Shape",
    "add_system",
    "carries",
    "choose_shape",
    "conversation",
    "present",
    "rename",
    "text_column",
]

_SYSTEM = ("system", "developer")

TWO_SYSTEMS = "the system column is ignored if there is a system turn"
NULL_ARGUMENTS = "null arguments of tool calls are trained unchanged"
NULL_PROPERTIES = "null properties of tools were removed"


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
    """What the row gives the chat template beside messages and tools."""
    notes: tuple[str, ...] = ()
    """What deserves a look in this row."""
    group: bytes | None = None
    """A hash of the value of `data.group_by`: examples that share it must not be held apart."""
    source: int = 0
    """Which of several data sets it is from."""
    rejected: Example | None = None
    """The same prompt with the answer that is rejected, where the example is a pair."""
    desirable: bool | None = None
    """Whether the answer is called good or bad, where rows are of single answers that are."""

    unanswered: bool = False
    """The row is a prompt alone; its last turn, or what follows `prompt`, only stands where the answer would."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the row that rewards see."""

    def memory(self) -> int:
        """About the bytes that it takes."""
        own = 500 + len(str(self.messages)) + len(str(self.tools or "")) + len(self.text)
        own += len(str(self.columns)) if self.columns else 0
        return own + (self.rejected.memory() if self.rejected else 0)

    @property
    def key(self) -> bytes:
        """A hash of everything before the last answer, 16 bytes: examples that share it must not be held apart."""
        if self.messages:
            return _hash(self._plain(self.messages[: self.given if self.rejected else -1]).strip())
        return _hash((self.text if self.prompt is None else self.prompt).strip())

    @property
    def identity(self) -> bytes:
        """A hash of the whole example, 16 bytes: those that share it teach the same."""
        if self.rejected:
            return _hash((replace(self, rejected=None).identity + self.rejected.identity).hex())
        if self.desirable is not None:
            return _hash(f"{self.desirable} {replace(self, desirable=None).identity.hex()}")
        if self.messages:
            return _hash(f"{self.given} {self._plain(self.messages)}")
        return _hash(f"{-1 if self.prompt is None else len(self.prompt)} {self.text}")

    def _plain(self, messages: Sequence[Message]) -> str:
        asked = [messages, self.tools, *([self.chat_template_kwargs] if self.chat_template_kwargs else [])]
        return json.dumps(asked, sort_keys=True, default=str)

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


def choose_shape(
    declared: str,
    columns: Set[str],
    renamed: Mapping[str, str],
    where: str,
    shapes: Mapping[str, Shape] | None = None,
) -> str:
    """The format of a file with these columns.

    Args:
        declared: a format's name, or `auto`.
        columns: the file's own column names.
        renamed: our column to the file's column.
        where: the file, for messages.
        shapes: the formats that the training can use, by name; those of single answers where none are given.

    Raises:
        DataError: a renaming names no column, the columns fit no format, or not the declared one.
    """
    shapes = SHAPES if shapes is None else shapes
    ours = sorted({name for shape in shapes.values() for name in (*shape.required, *shape.optional)})
    for our, theirs in renamed.items():
        if our not in ours:
            raise DataError(
                f"data.columns: {our}: not a column of ours{did_you_mean(our, ours)}; known: {listed(ours)}"
            )
        if theirs not in columns:
            near = did_you_mean(theirs, sorted(map(printable, columns)))
            raise DataError(f"{where}: data.columns: no column {theirs!r}{near}; it has {listed(sorted(columns))}")
    available = columns | renamed.keys()
    fitting = [name for name, shape in shapes.items() if available.issuperset(shape.required)]
    if declared == "auto" and fitting:
        return fitting[0]
    if declared in fitting:
        return declared
    if declared != "auto" and declared not in shapes:
        raise DataError(f"{where}: data.format: {declared} is not for this training.method; known: {listed(shapes)}")
    wanted = shapes if declared == "auto" else {declared: shapes[declared]}
    raise DataError(_no_fit(declared, wanted, set(map(printable, columns)), available, where))


def rename(values: Mapping[str, Any], renamed: Mapping[str, str]) -> Mapping[str, Any]:
    """`values` under our column names."""
    return {**values, **{our: values[theirs] for our, theirs in renamed.items() if theirs in values}}


def add_system(example: Example, system_prompt: str | None) -> Example:
    """`example` with `system_prompt` as its first turn, unless it has a system turn."""
    if system_prompt is None or any(turn["role"] in _SYSTEM for turn in example.messages):
        return example
    messages = ({"role": "system", "content": system_prompt}, *example.messages)
    rejected = add_system(example.rejected, system_prompt) if example.rejected else None
    return replace(example, messages=messages, given=example.given + 1 if example.given else 0, rejected=rejected)


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
        (theirs, ours[0])
        for theirs in sorted(columns - set(names))
        if (ours := difflib.get_close_matches(theirs, names, 1, 0.8))
    ]
    hint = f"; is {near[0][0]!r} meant to be {near[0][1]!r}?" if near else ""
    if "prompt" in available and "prompt" not in wanted:
        hint = "; such rows are for training.method: grpo"
    told = advice(columns) or f"{hint}; accepted: {choices}; rename with data.columns"
    return f"{where}: its columns ({has}) fit no format{told}"


def _example_column(missing: str, columns: Set[str]) -> str:
    near = difflib.get_close_matches(missing, sorted(columns), n=1)
    return near[0] if near else min(columns, default="your_column")


def text_column(values: Mapping[str, Any], column: str) -> str:
    """The text of a column. Raises `InvalidRow` where there is none, or something else."""
    value = values.get(column)
    if value is None:
        raise InvalidRow("missing column", _missing(values, column))
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InvalidRow("not text", f"{column} is a {kind}; text is expected")
    return value


def _missing(values: Mapping[str, Any], column: str) -> str:
    has = listed(map(str, values)) or "nothing"
    return f"{column} is null; fill it in" if column in values else f"no {column}; the row has {has}"


def present(values: Mapping[str, Any], column: str) -> Any:
    """The value of a column. Raises `InvalidRow` where there is none."""
    if values.get(column) is None:
        raise InvalidRow("missing column", _missing(values, column))
    return values[column]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def conversation(values: Mapping[str, Any], messages: list[Message], given: int = 0) -> Example:
    """An example of checked messages, and of what a row says beside them; the first `given` are its prompt.

    Raises:
        InvalidRow: nothing is answered, or a column beside them cannot be read.
    """
    notes = []
    if carries(values.get("system")) and text_of((told := _system(values))["content"]):
        if messages[0]["role"] in _SYSTEM:
            notes += [TWO_SYSTEMS] if text_of(messages[0].get("content")) != text_of(told["content"]) else []
        else:
            messages = [told, *messages]
            given += 1 if given else 0
    kept = trim(messages)
    if len(kept) <= given:
        raise InvalidRow("no assistant turn", "no assistant turn in the completion; there is nothing to learn from")
    tools, filled = tools_in(values)
    notes += [NULL_PROPERTIES] if filled else []
    notes += [NULL_ARGUMENTS] if any(_has_null_argument(turn) for turn in kept if turn.get("tool_calls")) else []
    return Example(
        "",
        messages=tuple(kept),
        tools=tools,
        given=given,
        trimmed=len(kept) < len(messages),
        chat_template_kwargs=_template_kwargs(values.get("chat_template_kwargs")),
        notes=tuple(notes),
    )


def _system(values: Mapping[str, Any]) -> Message:
    """The system turn of the column, which is text or a list of text parts."""
    if isinstance(told := values["system"], list):
        return check_messages([{"role": "system", "content": told}], "system")[0]
    return {"role": "system", "content": text_column(values, "system")}


def _has_null_argument(turn: Message) -> bool:
    calls = [call.get("function", call) for call in turn["tool_calls"]]
    return any(_has_null(call.get("arguments")) for call in calls)


def _has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(item is None or _has_null(item) for item in value.values())
    return isinstance(value, list) and any(map(_has_null, value))


def _template_kwargs(raw: Any) -> dict[str, Any]:
    if not carries(raw):
        return {}
    what = "chat_template_kwargs"
    given = _json_or_itself(raw)
    if not isinstance(given, dict):
        raise InvalidRow("bad chat_template_kwargs", f"{what}: an object is expected, not {type(given).__name__}")
    if taken := sorted(given.keys() & NOT_OPTIONS):
        raise InvalidRow("bad chat_template_kwargs", f"{what}: {taken[0]} cannot be set by a row; remove it")
    return {str(key): item for key, item in given.items()}


def _json_or_itself(raw: Any) -> Any:
    try:
        return JSON.decode(raw) if isinstance(raw, str) else raw
    except (ValueError, RecursionError):
        return raw


def _parse_messages(values: Mapping[str, Any]) -> Example:
    return conversation(values, check_messages(as_turns(present(values, "messages"), "messages")))


def _parse_sharegpt(values: Mapping[str, Any]) -> Example:
    turns = as_turns(present(values, "conversations"), "conversations")
    return conversation(values, check_messages(turns, "conversations"))


def _parse_pair(values: Mapping[str, Any]) -> Example:
    prompt, completion = present(values, "prompt"), present(values, "completion")
    if isinstance(prompt, list) != isinstance(completion, list):
        raise InvalidRow("mixed pair", "prompt and completion must both be text or both be lists of messages")
    if isinstance(prompt, list):
        given = check_messages(as_turns(prompt, "prompt"), "prompt")
        answered = check_messages(as_turns(completion, "completion"), "completion")
        return conversation(values, [*given, *answered], given=len(given))
    prompt, completion = text_column(values, "prompt"), text_column(values, "completion")
    if not completion.strip():
        raise InvalidRow("empty answer", "completion is empty; there is nothing to learn from")
    if chat := next((name for name in CHAT if carries(values.get(name))), None):
        raise InvalidRow("plain text", f"plain text has no place for {chat}; make prompt and completion messages")
    return Example("", prompt=prompt, text=prompt + completion)


def _parse_alpaca(values: Mapping[str, Any]) -> Example:
    given = text_column(values, "input") if values.get("input") else ""
    asked = instructed(text_column(values, "instruction"), given)
    turns = [*_history(values.get("history")), ("user", asked), ("assistant", text_column(values, "output"))]
    return conversation(values, [{"role": role, "content": content} for role, content in turns])


def _history(raw: Any) -> list[tuple[str, str]]:
    """Earlier questions and answers, oldest first, as turns."""
    if not carries(raw):
        return []
    pairs = _json_or_itself(raw)
    expected = "history: a list of [question, answer] is expected"
    if not isinstance(pairs, list):
        raise InvalidRow("bad history", f"{expected}, not {type(pairs).__name__}")
    turns = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) and said for said in pair):
            raise InvalidRow("bad history", f"{expected}; item {index + 1} is not one, or is empty")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def _parse_text(values: Mapping[str, Any]) -> Example:
    text = text_column(values, "text")
    if not text.strip():
        raise InvalidRow("empty text", "text is empty; there is nothing to learn from")
    return Example("", text=text)


CHAT = ("system", "tools", "functions", "chat_template_kwargs")
"""Columns that every conversation may have."""

SHAPES: Mapping[str, Shape] = {
    "messages": Shape(("messages",), CHAT, _parse_messages),
    "sharegpt": Shape(("conversations",), CHAT, _parse_sharegpt),
    "prompt-completion": Shape(("prompt", "completion"), CHAT, _parse_pair),
    "alpaca": Shape(("instruction", "output"), ("input", "history", *CHAT), _parse_alpaca),
    "text": Shape(("text",), (), _parse_text),
}
"""Every format by name, in the order in which `auto` tries them."""


def carries(value: Any) -> bool:
    """Whether a value says anything: Arrow's tables hold empty lists and nulls where a row has nothing."""
    if isinstance(value, (list, tuple)):
        return any(map(carries, value))
    if isinstance(value, Mapping):
        return any(map(carries, value.values()))
    return value is not None and value != ""
