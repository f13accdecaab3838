"""Turns as other tools and services write them, carried over: speakers, calls as text, parts, marks of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.data.conversation import CALLS, FLAGS, ROLES
from toolkit.data.parts import spread
from toolkit.data.problems import JSON, InvalidRow
from toolkit.errors import did_you_mean

__all__ = ["as_turns", "role_of", "turns_in"]

_CALL = "function_call"
_SPEAKERS: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": _CALL,
    "tool_call": _CALL,
}
_OTHER_MARKS: Mapping[str, str] = {
    "loss_weight": "weight",
    "loss_scale": "weight",
    "loss_mask": "train",
    "mask": "train",
}
"""Other names of the marks of a turn, each with ours; `mask: true` leaves a turn out."""
_FOREIGN = frozenset({*_OTHER_MARKS, "train_detail"})


def as_turns(raw: Any, column: str) -> Any:
    """A conversation with `role` and `content` in every turn, or `raw` where it is none, which others refuse.

    Args:
        raw: a list of turns, or JSON text of one (as CSV holds it).
        column: its name, for messages to people.

    Raises:
        InvalidRow: an unknown speaker, a call that is no call, or a mark of training that cannot be followed.
    """
    turns = turns_in(raw)
    if not isinstance(turns, list):
        return raw
    found: list[Any] = []
    for index, turn in enumerate(turns):
        where = f"{column}[{index}]"
        ones = spread(_turn(turn, where), where) if isinstance(turn, dict) else [turn]
        # Calls alone, as they stand in the file, belong to the assistant's turn before them.
        if found and role_of(turn) == _CALL and _goes_on(found[-1], ones[0]):
            found[-1] = {**found[-1], CALLS: [*(found[-1].get(CALLS) or []), *ones[0][CALLS]]}
        else:
            found += ones
    return found


def role_of(turn: Any) -> str | None:
    """The role of a turn as it stands in a file; nothing where it has none that is known."""
    speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    return _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None


def _goes_on(before: Any, call: dict[str, Any]) -> bool:
    if not isinstance(before, dict) or before.get("role") != "assistant":
        return False
    alike = all(before.get(mark) == call.get(mark) for mark in FLAGS)
    return alike and isinstance(before.get(CALLS) or [], list)


def turns_in(raw: Any) -> Any:
    """What JSON text of a list holds, as CSV has it; anything else as it is."""
    if not isinstance(raw, str) or not raw.lstrip().startswith("["):
        return raw
    try:
        return JSON.decode(raw)
    except (ValueError, RecursionError):
        return raw


def _turn(turn: dict[str, Any], where: str) -> dict[str, Any]:
    if "from" in turn:
        turn = _of_speaker(turn, where)
    elif turn.get("role") not in ROLES and (role := role_of(turn)):
        turn = {**turn, "role": role}
    if turn.get("role") == _CALL:
        calls = _calls(turn.get("content"), where)
        turn = {**turn, "role": "assistant", "content": "", CALLS: calls}
    elif turn.get("function_call") is not None and turn.get("role") == "assistant":
        if turn.get(CALLS):
            raise InvalidRow("bad tool call", f"{where}: has both function_call and tool_calls; keep one")
        rest = {key: item for key, item in turn.items() if key != "function_call"}
        turn = {**rest, CALLS: _calls(turn["function_call"], where)}
    return turn if turn.keys().isdisjoint(_FOREIGN) else _marked(turn, where)


def _of_speaker(turn: dict[str, Any], where: str) -> dict[str, Any]:
    speaker = turn["from"]
    role = role_of(turn)
    if role is None:
        near = did_you_mean(str(speaker), list(_SPEAKERS)) or f"; known: {', '.join(_SPEAKERS)}"
        raise InvalidRow("unknown role", f"{where}: unknown speaker {ascii(speaker)[:40]}{near}")
    rest = {key: item for key, item in turn.items() if key not in ("from", "value", "role", "content")}
    return {"role": role, "content": turn.get("value", turn.get("content")), **rest}


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    try:
        calls = JSON.decode(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) for call in calls):
        raise InvalidRow("bad tool call", f"{where}: a call is an object with name and arguments, or JSON text of one")
    return [call if "function" in call else {"type": "function", "function": _arguments(call)} for call in calls]


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments under their usual name."""
    if "arguments" in call or "parameters" not in call:
        return call
    return {("arguments" if key == "parameters" else key): item for key, item in call.items()}


def _marked(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """The turn with its marks under our names.

    Raises:
        InvalidRow: a mark that is no yes or no, two that differ, or one for a part of the turn.
    """
    if turn.get("train_detail"):
        raise InvalidRow("bad weight", f"{where}: train_detail: a turn is trained whole or not at all; split the turn")
    kept = {key: item for key, item in turn.items() if key not in _FOREIGN}
    for name, ours in _OTHER_MARKS.items():
        if (value := turn.get(name)) is None:
            continue
        if name == "mask" and not isinstance(value, bool):
            raise InvalidRow("bad weight", f"{where}: mask is {ascii(value)[:40]}; write train: true or train: false")
        value = not value if name == "mask" else value
        if kept.get(ours) is not None and bool(kept[ours]) != bool(value):
            raise InvalidRow("bad weight", f"{where}: {name} and {ours} say different things; keep one")
        kept[ours] = value
    return kept
