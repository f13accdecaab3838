"""Contents in parts as Anthropic writes them: a thought, text, calls and results of tools, to the turns of templates.

A template knows a thought and calls as keys of the answer, and a result as a turn of its own. Gemini's parts are given
these names first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from toolkit.data.conversation import CALLS, THOUGHT_FIELDS
from toolkit.data.problems import InvalidRow

__all__ = ["spread", "turn_of_gemini"]

_THOUGHT, _CALL, _RESULT = "thinking", "tool_use", "tool_result"
_PLACES: Mapping[Any, int] = {_THOUGHT: 0, _CALL: 2}
"""Where a part stands in an answer as every template writes it; text and what is unknown between them."""


def spread(turn: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The turn, or the turns that its parts are; parts that nothing here knows stay in the content.

    Args:
        turn: with `role`.
        where: its place, for messages to people.

    Raises:
        InvalidRow: an answer whose parts no template writes in this order, or that says one thing in two places.
    """
    content = turn.get("content")
    kinds = (_THOUGHT, _CALL) if turn.get("role") == "assistant" else (_RESULT,)
    if not isinstance(content, list) or not any(_kind(part) in kinds for part in content):
        return [turn]
    parts = [{k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part for part in content]
    return [_answer(turn, parts, where)] if turn.get("role") == "assistant" else list(_asked(turn, parts))


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) and isinstance(part.get("type"), str) else None


def _answer(turn: dict[str, Any], parts: list[Any], where: str) -> dict[str, Any]:
    places = [_PLACES.get(_kind(part), 1) for part in parts]
    if places != sorted(places) or places.count(0) > 1:
        order = ", ".join(str(_kind(part) or "text") for part in parts)
        raise InvalidRow(
            "parts out of order",
            f"{where}: its parts are {order}; chat templates write one thought, then text, then calls: write it as "
            "several turns, or take parts out",
        )
    for place, key in ((0, next(filter(turn.get, THOUGHT_FIELDS), "")), (2, CALLS)):
        if place in places and turn.get(key):
            raise InvalidRow("bad messages", f"{where}: {key} stands in a part and beside the content; keep one")
    text = [part for part, place in zip(parts, places, strict=True) if place == 1]
    made = {**turn, "content": text or ""}
    for part, place in zip(parts, places, strict=True):
        if place == 0:
            made = {**_rest(part, "thinking"), **made, THOUGHT_FIELDS[0]: _thought(part.get("thinking", ""))}
        elif place == 2:
            function = {"name": part.get("name"), "arguments": part.get("input", {})}
            call = {**({"id": part["id"]} if "id" in part else {}), "type": "function", "function": function}
            made = {**_rest(part, "id", "name", "input"), **made, CALLS: [*(made.get(CALLS) or []), call]}
    return made


def _asked(turn: dict[str, Any], parts: list[Any]) -> Iterator[dict[str, Any]]:
    """Results of tools as turns of their own, and what stands between them."""
    for is_result, group in groupby(parts, lambda part: _kind(part) == _RESULT):
        if not is_result:
            yield {**turn, "content": list(group)}
            continue
        for part in group:
            rest = _rest(part, "tool_use_id", "content", *(() if part.get("is_error") else ("is_error",)))
            of = {"tool_call_id": part["tool_use_id"]} if "tool_use_id" in part else {}
            yield {"role": "tool", "content": part.get("content", ""), **of, **rest}


def _rest(part: dict[str, Any], *read: str) -> dict[str, Any]:
    """What else a part says, which becomes keys of its turn, so that a template may read it or a notice tells of it."""
    return {key: value for key, value in part.items() if key not in ("type", *read)}


def _thought(value: Any) -> Any:
    """A thought's text; Mistral writes it as parts."""
    if isinstance(value, list) and all(_kind(part) == "text" and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    return value


def turn_of_gemini(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One of Gemini's `contents` as a turn with `role` and `content`, its parts named as above.

    Raises:
        InvalidRow: a part that is no text, call or result.
    """
    parts = turn.get("parts")
    if not isinstance(parts, list):
        raise InvalidRow("bad messages", f"{where}: parts: a list is expected")
    content = [_part(part, f"{where}.parts[{index}]") for index, part in enumerate(parts)]
    return {**{key: value for key, value in turn.items() if key != "parts"}, "content": content}


def _part(part: Any, where: str) -> dict[str, Any]:
    kept = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    call, result = kept.pop("functionCall", None), kept.pop("functionResponse", None)
    thought = kept.pop("thought", False)
    if isinstance(call, dict) and "text" not in kept and result is None:
        found = {"type": _CALL, "name": call.get("name"), "input": call.get("args") or {}, "id": call.get("id")}
    elif isinstance(result, dict) and "text" not in kept and call is None:
        told = result.get("response", "")
        content = told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)
        found = {"type": _RESULT, "name": result.get("name"), "tool_use_id": result.get("id"), "content": content}
    elif isinstance(kept.get("text"), str) and call is None and result is None:
        text = kept.pop("text")
        found = {"type": _THOUGHT, "thinking": text} if thought else {"type": "text", "text": text}
    else:
        what = ", ".join(map(str, part)) if isinstance(part, dict) else type(part).__name__
        raise InvalidRow("content is not text", f"{where}: a part of {what[:60] or 'nothing'}; only text is trained")
    return {**kept, **{key: value for key, value in found.items() if value is not None}}
