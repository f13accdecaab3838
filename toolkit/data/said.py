"""What a message says, as texts that a rendering must hold, and the same conversation with every text replaced.

A chat template may leave out a turn, a thought or a call without an error. Looking for a turn's own words misses that
where another turn says the same; so a conversation of the same shape in unique words is rendered, too, once a shape.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from toolkit.data.conversation import CALLS, THOUGHT_FIELDS, Message, text_of, thought_of, without_thought

__all__ = ["Probe", "left_out", "shape", "texts_of"]

_WORD = "onecardprobe{:04d}end"
_TOOLS = 9000
_NUMBER = 730_000


Told = tuple[str, str]
"""What kind of thing is told (`content`, `thought`, `call`), and its text."""


def texts_of(message: Message) -> Iterator[Told]:
    """Every text of a message that a rendering of it must hold."""
    if thought := thought_of(message):
        yield "thought", thought
    if content := text_of(without_thought(message).get("content")):
        yield "content", content
    if isinstance(written := message.get("function_calls"), str):
        yield "call", written
    for call in message.get(CALLS) or ():
        function = call.get("function", call)
        yield "call", function["name"]
        yield from (("call", leaf) for leaf in _leaves(function.get("arguments")))


def left_out(text: str, message: Message, *, thought: bool = True) -> str | None:
    """The kind of the first thing that a message says and `text` does not hold; `thought`: whether thoughts count."""
    return next(
        (kind for kind, told in texts_of(message) if (thought or kind != "thought") and not _holds(text, told)), None
    )


def shape(messages: Sequence[Message], tools: Any) -> tuple[Any, ...]:
    """What two conversations share that a template treats alike: roles, keys, and which texts are empty or thoughts."""
    return (*(_shape(message) for message in messages), bool(tools))


class Probe:
    """A conversation of the same shape in which every text is a word of its own.

    `messages` and `tools` are it; `words` says for each word which turn it stands in and what kind of thing it is.
    """

    def __init__(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
        self.words: dict[str, tuple[int, str]] = {}
        self._names: dict[str, str] = {}
        self._turn = 0
        self.messages: list[Message] = []
        for self._turn, message in enumerate(messages):
            self.messages.append(self._message(message))
        self.told_tools: list[str] = []
        """Words of the tools' descriptions, one a tool."""
        self.tools = [self._tool(tool) for tool in tools] if tools else None

    def lost(self, text: str) -> Iterator[tuple[int, str]]:
        """Turn and kind of what `text` does not hold."""
        return (place for word, place in self.words.items() if word not in text)

    def _word(self, kind: str) -> str:
        word = _WORD.format(len(self.words))
        self.words[word] = (self._turn, kind)
        return word

    def _name(self, name: str) -> str:
        if name not in self._names:
            self._names[name] = self._word("call")
        return self._names[name]

    def _message(self, message: Message) -> Message:
        bare, result = without_thought(message), dict(message)
        is_inline = bare.get("content") != message.get("content")
        for key in THOUGHT_FIELDS:
            if isinstance(told := message.get(key), str) and told.strip():
                result[key] = self._word("thought")
        thought = f"<think>\n{self._word('thought')}\n</think>\n\n" if is_inline else ""
        result["content"] = self._content(bare.get("content"), thought)
        if "content" not in message:
            del result["content"]
        if message.get(CALLS):
            result[CALLS] = [self._call(call) for call in message[CALLS]]
        if isinstance(message.get("function_calls"), str):
            result["function_calls"] = self._word("call")
        if message["role"] in ("tool", "function", "environment") and isinstance(message.get("name"), str):
            result["name"] = self._names.get(message["name"], message["name"])
        return result

    def _content(self, content: Any, thought: str) -> Any:
        if isinstance(content, list):
            return [
                {**part, "text": self._word("content")} if part.get("text", "").strip() else part for part in content
            ]
        if isinstance(content, str) and content.strip():
            return thought + self._word("content")
        return content

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        inner = call.get("function", call)
        arguments = inner.get("arguments")
        if isinstance(arguments, str):
            arguments = json.dumps(self._values(json.loads(arguments or "{}")), ensure_ascii=False)
        else:
            arguments = self._values(arguments)
        changed = {**inner, "name": self._name(inner["name"]), "arguments": arguments}
        return {**call, "function": changed} if "function" in call else changed

    def _values(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._values(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self._values(each) for each in value]
        if isinstance(value, str) and value.strip():
            return self._word("call")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            number = _NUMBER + len(self.words)
            self.words[str(number)] = (self._turn, "call")
            return number
        return value

    def _tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        inner = tool.get("function", tool)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            return dict(tool)
        self.told_tools.append(_WORD.format(_TOOLS + len(self.told_tools)))
        told = {"name": self._names.get(inner["name"], inner["name"]), "description": self.told_tools[-1]}
        changed = {**inner, **told}
        return {**tool, "function": changed} if "function" in tool else changed


def _shape(message: Message) -> tuple[Any, ...]:
    content, calls = message.get("content", ...), message.get(CALLS)
    kind = (
        content
        if content in (..., None, "")
        else (type(content).__name__, len(content) if isinstance(content, list) else 0)
    )
    thought = thought_of(message)
    arguments = tuple(
        (type((inner := call.get("function", call)).get("arguments")).__name__, "id" in call, inner is call)
        for call in calls or ()
    )
    extra = tuple(sorted(key for key in message if key not in ("role", "content", CALLS)))
    return (
        message["role"],
        kind,
        bool(thought),
        thought and thought not in (message.get(key) for key in THOUGHT_FIELDS),
        arguments,
        extra,
    )


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value[:1] in "{[":
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield str(key)
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, str):
        yield value


def _holds(text: str, told: str) -> bool:
    """Whether the words stand there: as they are, line by line (templates indent and trim), or as JSON writes them."""
    words = told.strip()
    if not words or words in text:
        return True
    return all(_line_holds(text, line) for line in re.split(r"[\r\n]+", words))


def _line_holds(text: str, line: str) -> bool:
    line = line.strip()
    return line in text or _escaped(line) in text or _escaped(line, ascii_only=True) in text


def _escaped(line: str, *, ascii_only: bool = False) -> str:
    return json.dumps(line, ensure_ascii=ascii_only)[1:-1]
