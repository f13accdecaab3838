"""Turns as other tools write them, in the form that chat templates read: speakers, calls as text, marks of training.

What a turn carries beside role and content is kept; nothing is judged here but what could not be carried over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from toolkit.data.problems import InvalidRow
from toolkit.errors import did_you_mean

__all__ = ["as_turns"]

_CALL = "function_call"
_SPEAKERS: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
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
_ROLES = ("function_call", "tool_call", "observation", "function_response", "tool_response")
"""Speakers that also stand as roles of messages, and that no chat template knows."""

_MARKS: Mapping[str, str] = {"loss_weight": "weight", "loss_scale": "weight", "loss_mask": "train", "mask": "train"}
"""Other names of the marks of a turn, and ours; `mask: true` leaves a turn out."""
_OURS = ("train", "weight", "loss")
_FOREIGN = frozenset({*_MARKS, "train_detail"})


def as_turns(raw: Any, column: str) -> Any:
    """A conversation with `role` and `content` in every turn, or `raw` where it is none, which others refuse.

    Args:
        raw: a list of turns, or JSON text of one (as CSV holds it).
        column: its name, for messages to people.

    Raises:
        InvalidRow: an unknown speaker, a call that is no call, or a mark of training that cannot be followed.
    """
    turns = _from_text(raw)
    if not isinstance(turns, list):
        return raw
    found: list[Any] = []
    for index, turn in enumerate(turns):
        where = f"{column}[{index}]"
        one = _turn(turn, where) if isinstance(turn, dict) else turn
        if found and _is_call(turn) and _goes_on(found[-1], one):
            found[-1] = {**found[-1], "tool_calls": [*(found[-1].get("tool_calls") or []), *one["tool_calls"]]}
        else:
            found.append(one)
    return found


def _is_call(turn: Any) -> bool:
    """Whether a turn, as it stands in the file, is calls alone, which belong to the assistant's turn before them."""
    return isinstance(turn, dict) and _SPEAKERS.get(str(turn.get("from", turn.get("role")))) == _CALL


def _goes_on(before: Any, call: dict[str, Any]) -> bool:
    if not isinstance(before, dict) or before.get("role") != "assistant":
        return False
    alike = all(before.get(mark) == call.get(mark) for mark in _OURS)
    return alike and isinstance(before.get("tool_calls") or [], list)


def _from_text(raw: Any) -> Any:
    if not isinstance(raw, str) or not raw.lstrip().startswith("["):
        return raw
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw


def _turn(turn: dict[str, Any], where: str) -> dict[str, Any]:
    if "from" in turn:
        turn = _of_speaker(turn, where)
    elif turn.get("role") in _ROLES:
        turn = {**turn, "role": _SPEAKERS[turn["role"]]}
    if turn.get("role") == _CALL:
        calls = _calls(turn.get("content"), where)
        turn = {**turn, "role": "assistant", "content": "", "tool_calls": calls}
    elif turn.get("function_call") is not None and turn.get("role") == "assistant":
        if turn.get("tool_calls"):
            raise InvalidRow("bad tool call", f"{where}: function_call and tool_calls both stand in it; keep one")
        rest = {key: item for key, item in turn.items() if key != "function_call"}
        turn = {**rest, "tool_calls": _calls(turn["function_call"], where)}
    return turn if turn.keys().isdisjoint(_FOREIGN) else _marked(turn, where)


def _of_speaker(turn: dict[str, Any], where: str) -> dict[str, Any]:
    speaker = turn["from"]
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        near = did_you_mean(str(speaker), list(_SPEAKERS)) or f"; known: {', '.join(_SPEAKERS)}"
        raise InvalidRow("unknown role", f"{where}: unknown speaker {ascii(speaker)[:40]}{near}")
    rest = {key: item for key, item in turn.items() if key not in ("from", "value", "role", "content")}
    return {"role": role, "content": turn.get("value", turn.get("content")), **rest}


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
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
    for name, ours in _MARKS.items():
        if (value := turn.get(name)) is None:
            continue
        if name == "mask" and not isinstance(value, bool):
            raise InvalidRow("bad weight", f"{where}: mask is {ascii(value)[:40]}; write train: true or train: false")
        value = not value if name == "mask" else value
        if kept.get(ours) is not None and bool(kept[ours]) != bool(value):
            raise InvalidRow("bad weight", f"{where}: {name} and {ours} say different things; keep one")
        kept[ours] = value
    return kept
