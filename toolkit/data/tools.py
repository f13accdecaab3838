"""The tools of a row: JSON schemas under the names that services give them, as chat templates want them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from toolkit.data.conversation import check_tools
from toolkit.data.problems import InvalidRow

__all__ = ["tools_in"]


def tools_in(values: Mapping[str, Any]) -> tuple[list[dict[str, Any]] | None, bool]:
    """The tools of a row, from `tools` or the older `functions`, and whether null properties were taken out.

    Raises:
        InvalidRow: they are no list of schemas, or stand in both.
    """
    tools = [one for tool in check_tools(values.get("tools")) or () for one in _declared(tool)]
    try:
        functions = check_tools(values.get("functions"))
    except InvalidRow as problem:
        raise InvalidRow(problem.reason, f"functions, read as {problem.detail}") from None
    if tools and functions:
        raise InvalidRow("bad tools", "the row has both tools and functions; keep one")
    if functions:
        tools = [one if "function" in one else {"type": "function", "function": one} for one in functions]
    if not tools:
        return None, False
    taken: list[str] = []
    return [_schema(tool, taken) for tool in tools], bool(taken)


def _schema(value: Any, taken: list[str]) -> Any:
    """A JSON schema without properties that are null: no such schema exists, so a table's padding left them."""
    if isinstance(value, list):
        return [_schema(item, taken) for item in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, item in value.items():
        if key == "properties" and isinstance(item, dict):
            taken += [name for name, schema in item.items() if schema is None]
            found[key] = {name: _schema(schema, taken) for name, schema in item.items() if schema is not None}
        else:
            found[key] = item if key in _VALUES else _schema(item, taken)
    return found


_VALUES = ("default", "const", "enum", "example", "examples")
"""Keywords of a schema that hold values, in which `properties` is a word like any other."""


def _declared(tool: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tools of one item: of Anthropic's and Gemini's names, those of chat templates."""
    several = next((tool[key] for key in _SEVERAL if isinstance(tool.get(key), list)), None)
    if several is not None and len(tool) == 1:
        yield from ({"type": "function", "function": _lowered(one)} for one in several)
    elif isinstance(schema := tool.get("input_schema"), dict):
        rest = {key: item for key, item in tool.items() if key not in ("type", "input_schema")}
        yield {"type": "function", "function": {**rest, "parameters": schema}}
    else:
        yield tool


def _lowered(value: Any) -> Any:
    """A schema with the names of types that JSON Schema has; Gemini's are in capitals."""
    if isinstance(value, list):
        return [_lowered(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: item.lower() if key == "type" and item in _TYPES else item if key in _VALUES else _lowered(item)
        for key, item in value.items()
    }


_SEVERAL = ("functionDeclarations", "function_declarations")
_TYPES = ("ARRAY", "BOOLEAN", "INTEGER", "NULL", "NUMBER", "OBJECT", "STRING")
