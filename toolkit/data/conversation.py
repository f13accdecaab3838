"""A list of messages as chat templates want it, checked turn by turn.

Templates render a misspelt role or a missing content silently into training text, so everything a template would not
refuse by itself is refused here.
"""

from __future__ import annotations

import json
from typing import Any

from toolkit.data.problems import InvalidRow
from toolkit.errors import did_you_mean

__all__ = ["ROLES", "Message", "check_messages", "check_tools", "trim"]

Message = dict[str, Any]
ROLES = ("assistant", "system", "tool", "user")


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
        if turn["role"] == "assistant" and not turn.get("tool_calls") and not turn["content"].strip():
            raise InvalidRow("empty answer", f"turn {index + 1} (assistant) is empty; there is nothing to learn from")
    return kept


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
    checked = {key: value for key, value in turn.items() if value is not None}
    if role == "assistant" and turn.get("tool_calls"):
        checked["tool_calls"] = [_check_call(call, where) for call in _list(turn["tool_calls"], where)]
    elif "content" not in checked:
        raise InvalidRow("no content", f"{where}: no content; every turn needs text (or an assistant's tool_calls)")
    if not isinstance(checked.get("content", ""), str):
        raise InvalidRow("content is not text", f"{where}: content is {_kind(checked['content'])}; text is expected")
    return checked


def _check_call(call: Any, where: str) -> dict[str, Any]:
    """One tool call, its arguments as an object: templates write them with `tojson`, which would quote text twice."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRow("bad tool call", f"{where}: a tool call needs function.name and function.arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _from_text(arguments or "{}", f"{where}: function.arguments", "bad tool call")
    inner = {**function, "arguments": arguments}
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
        return json.loads(raw)
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
