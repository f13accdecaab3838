"""A list of messages as chat templates want it, every turn checked.

Templates render a misspelt role or a missing content silently into training text, so everything a template would not
refuse by itself is refused here. What a turn carries beyond that is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from toolkit.data.problems import JSON, InvalidRow
from toolkit.errors import did_you_mean

__all__ = [
    "CALLS",
    "FLAGS",
    "ROLES",
    "THOUGHT_FIELDS",
    "Message",
    "check_messages",
    "check_tools",
    "is_trained",
    "odd_thoughts",
    "text_of",
    "thought_of",
    "trim",
    "without_thought",
]

Message = dict[str, Any]
ROLES = ("assistant", "developer", "environment", "function", "system", "tool", "user")
CALLS = "tool_calls"
THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""The keys that a message's thought stands under; the first is the usual one."""

FLAGS = ("train", "weight", "loss")
"""Whether a turn is trained, as Axolotl, OpenAI and ms-swift say it."""
# A prompt that opens the thought leaves its opening out of the answer; then its end stands on a line of its own.
_INLINE = re.compile(r"\s*(?:<think>(.*?)</think>|(.*?)(?:\n</think>|</think>[ \t]*\n))\s*", re.DOTALL)


def check_messages(raw: Any, column: str = "messages") -> list[Message]:
    """The turns of one conversation.

    Args:
        raw: a list of messages, or JSON text of one (as CSV holds it).
        column: its name, for messages to people.

    Raises:
        InvalidRow: not a list of messages, an unknown role, or a content that is not text.
    """
    turns = _from_text(raw, column, "bad messages")
    if not isinstance(turns, list) or not turns:
        raise InvalidRow("bad messages", f"{column}: a non-empty list of messages is expected, not {_kind(turns)}")
    return [_check_turn(turn, f"{column}[{index}]") for index, turn in enumerate(turns)]


def check_tools(raw: Any) -> list[dict[str, Any]] | None:
    """The tool schemas of one row: a list, or JSON text of one; nothing where there are none.

    Raises:
        InvalidRow: anything else.
    """
    if raw is None or raw == "":
        return None
    tools = _from_text(raw, "tools", "bad tools")
    tools = [_from_text(tool, "tools", "bad tools") for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRow("bad tools", f"tools: a list of JSON schemas is expected, not {_kind(tools)}")
    return tools or None


def trim(messages: list[Message]) -> list[Message]:
    """The conversation up to its last assistant turn: what follows it has no answer and would not be trained.

    Raises:
        InvalidRow: there is no assistant turn, or an assistant turn says nothing.
    """
    last = max((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise InvalidRow("no assistant turn", "no assistant turn; there is nothing to learn from")
    kept = messages[: last + 1]
    for index, turn in enumerate(kept):
        if turn["role"] == "assistant" and not _says_something(turn):
            raise InvalidRow("empty answer", f"turn {index + 1} (assistant) is empty; there is nothing to learn from")
    return kept


def is_trained(message: Message) -> bool:
    """Whether the row wants this turn trained: `train: false`, `weight: 0` and `loss: false` say no."""
    return not any(message.get(flag) is False or message.get(flag) == 0 for flag in FLAGS if flag in message)


def text_of(content: Any) -> str:
    """The text of a content: itself, or its text parts, a line each; nothing where there is none."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def thought_of(message: Message) -> str:
    """The thought of a message, from a key of its own or from `<think>…</think>` at the start of its content."""
    if message["role"] != "assistant":
        return ""
    for key in THOUGHT_FIELDS:
        if isinstance(told := message.get(key), str) and told.strip():
            return told
    inline = _INLINE.match(text_of(message.get("content")))
    return (inline.group(1) or inline.group(2) or "").strip() if inline else ""


def odd_thoughts(message: Message) -> Iterator[str]:
    """What deserves a look of the thoughts of a message."""
    told = {message[key].strip() for key in THOUGHT_FIELDS if message.get(key)} - {""}
    if message["role"] != "assistant":
        if told:
            yield "a thought stands in a turn that is not the assistant's, where chat templates read none"
        return
    content = text_of(message.get("content")).lstrip()
    if len(told) > 1:
        yield f"a turn has two different thoughts; the first of {', '.join(THOUGHT_FIELDS)} is trained"
    if told and _INLINE.match(content):
        yield "a turn has a thought under a key of its own and one in <think>…</think>; both are trained"
    if content.startswith("<think>") and "</think>" not in content:
        yield "an answer opens a thought with <think> and does not close it"


def without_thought(message: Message) -> Message:
    """The message without its thought; itself where it has none."""
    if message["role"] != "assistant":
        return message
    content = message.get("content")
    inline = _INLINE.match(content) if isinstance(content, str) else None
    if not inline and not any(key in message for key in THOUGHT_FIELDS):
        return message
    bare = {key: value for key, value in message.items() if key not in THOUGHT_FIELDS}
    return {**bare, "content": content[inline.end() :]} if inline and isinstance(content, str) else bare


def _says_something(turn: Message) -> bool:
    said = text_of(without_thought(turn).get("content")).strip()
    return bool(said or turn.get(CALLS) or turn.get("function_calls"))


def _check_turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise InvalidRow("bad messages", f"{where}: a message is an object with role and content, not {_kind(turn)}")
    if "role" not in turn:
        near = did_you_mean("role", [str(key) for key in turn])
        raise InvalidRow("no role", f"{where}: no role; it has {', '.join(map(str, turn)) or 'nothing'}{near}")
    role = turn["role"]
    if role not in ROLES:
        near = did_you_mean(str(role), list(ROLES)) or f"; known: {', '.join(ROLES)}"
        raise InvalidRow("unknown role", f"{where}: unknown role {_short(role)}{near}")
    checked = {key: value for key, value in turn.items() if value is not None and not (key == CALLS and value == [])}
    _check_flags(checked, where)
    _check_thought(checked, where)
    if role == "assistant" and turn.get(CALLS):
        checked[CALLS] = [_check_call(call, where) for call in _list(turn[CALLS], where)]
    called = role == "assistant" and (CALLS in checked or "function_calls" in checked)
    if called and "content" in turn:
        checked["content"] = turn["content"]
    elif not called and "content" not in checked:
        raise InvalidRow("no content", f"{where}: no content; every turn needs text (or an assistant's tool_calls)")
    return _check_content(checked, where)


def _check_content(checked: Message, where: str) -> Message:
    content = checked.get("content", "")
    if isinstance(content, list):
        checked["content"] = [_check_part(part, where) for part in content]
    elif content is not None and not isinstance(content, str):
        raise InvalidRow("content is not text", f"{where}: content is {_kind(content)}; text is expected")
    return checked


def _check_part(part: Any, where: str) -> dict[str, Any]:
    """One part of a content in the form `[{"type": "text", "text": …}]`."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kept = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    if isinstance(kept.get("text"), str) and kept.get("type", "text") in _TEXT:
        return {**kept, "type": "text"}
    what = kept.get("type") or _kind(part)
    raise InvalidRow("content is not text", f"{where}: content has a part of type {_short(what)}; only text is trained")


_TEXT = ("text", "input_text", "output_text")
"""Types of parts that are text."""


def _check_flags(turn: Message, where: str) -> None:
    for flag in FLAGS:
        if flag in turn and turn[flag] not in (True, False):
            raise InvalidRow(
                "bad weight", f"{where}: {flag} is {_short(turn[flag])}; a turn is trained (1, true) or not (0, false)"
            )


def _check_thought(turn: Message, where: str) -> None:
    for key in THOUGHT_FIELDS:
        if key in turn and not isinstance(turn[key], str):
            raise InvalidRow(
                "thought is not text",
                f"{where}: {key} is {_kind(turn[key])}; a thought is text",
            )


def _check_call(call: Any, where: str) -> dict[str, Any]:
    """One tool call, its arguments as an object: templates write them with `tojson`, which would quote text twice."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRow("bad tool call", f"{where}: a tool call needs function.name and function.arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _from_text(arguments or "{}", f"{where}: function.arguments", "bad tool call")
    inner = {**function, "arguments": {} if arguments is None else arguments}
    return {**call, "type": "function", "function": inner} if "function" in call else inner


def _list(value: Any, where: str) -> list[Any]:
    parsed = _from_text(value, f"{where}: tool_calls", "bad tool call")
    if not isinstance(parsed, list):
        raise InvalidRow("bad tool call", f"{where}: tool_calls is {_kind(parsed)}; a list is expected")
    return parsed


def _from_text(raw: Any, what: str, reason: str) -> Any:
    if not isinstance(raw, str):
        return raw
    try:
        return JSON.decode(raw)
    except (ValueError, RecursionError):
        raise InvalidRow(reason, f"{what}: text that is not JSON ({_short(raw)})") from None


def _kind(value: Any) -> str:
    if value == []:
        return "an empty list"
    return {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text"}.get(
        type(value).__name__, f"{type(value).__name__} {_short(value)}"
    )


def _short(value: Any) -> str:
    shown = ascii(value) if not isinstance(value, str) else repr(value.encode("utf-8", "replace").decode())
    return shown if len(shown) <= 40 else shown[:39] + "…"
