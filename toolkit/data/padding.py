"""Whether the nulls of a JSON file were written by its author or filled in by Arrow, and a row without the latter.

Arrow gives every struct the keys of all its rows, so `Dataset.to_json` writes keys that no row had. The file does not
say so, and no library tells them apart: here the keys' sameness does, and nulls that nobody writes by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Padding", "find_padding", "is_turn"]

_BATCH = 256
_UNSURE = ("content", "value", "text")
"""Keys of a message that hand-written files leave null, too, beside tool calls."""


def is_turn(keys: Iterable[str]) -> bool:
    """Whether an object with these keys is a turn of a conversation, whose nulls mean nothing."""
    return not {"role", "from"}.isdisjoint(keys)


class _Struct:
    """All objects that stand at one path, lists looked through: their keys, and which are null or not."""

    __slots__ = ("calls", "children", "filled", "keys", "null", "uniform")

    def __init__(self) -> None:
        self.keys: tuple[str, ...] | None = None
        self.uniform = True
        self.null: set[str] = set()
        self.filled: set[str] = set()
        self.children: dict[str, _Struct] = {}
        self.calls: dict[str, set[str]] = {}
        """By a function's name, the arguments that some call of it has."""

    def see(self, value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                self.see(item)
        elif value is not None and self.uniform:
            keys = tuple(value) if isinstance(value, dict) else ()
            self.keys = keys if self.keys is None else self.keys
            self.uniform = keys == self.keys
            if self.uniform and keys:
                self._see_values(value)

    def _see_values(self, value: dict[str, Any]) -> None:
        for key, item in value.items():
            (self.null if item is None else self.filled).add(key)
            if isinstance(item, (dict, list)):
                self.children.setdefault(key, _Struct()).see(item)
        name, arguments = value.get("name"), value.get("arguments")
        if isinstance(name, str) and isinstance(arguments, dict):
            self.calls.setdefault(name, set()).update(key for key, item in arguments.items() if item is not None)

    def proves(self, *, under_properties: bool = False) -> bool:
        """Whether some null at or under this path is one that Arrow fills in and people do not write."""
        if not self.uniform:
            return False
        mixed = self.null & self.filled
        if under_properties and self.null:
            return True
        if is_turn(self.keys or ()) and mixed.difference(_UNSURE):
            return True
        if self._proves_by_calls():
            return True
        # What an author put into arguments proves nothing about the file.
        inner = {key: child for key, child in self.children.items() if key != "arguments"}
        return any(child.proves(under_properties=key == "properties") for key, child in inner.items())

    def _proves_by_calls(self) -> bool:
        """Whether calls of one function carry, always as null, the arguments of another."""
        arguments = self.children.get("arguments")
        if arguments is None or not arguments.uniform:
            return False
        return any(arguments.null & arguments.filled - given for given in self.calls.values())


class Padding:
    """The structs of a file that Arrow wrote; `clean` takes what it filled in out of a row."""

    def __init__(self, root: _Struct) -> None:
        self._root = root

    def clean(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """The row without filled-in nulls, and whether one stood anywhere but beside a turn's own keys."""
        told = [False]
        cleaned = {
            key: self._clean(self._root.children[key], value, told) if isinstance(value, (dict, list)) else value
            for key, value in values.items()
        }
        return cleaned, told[0]

    def _clean(self, struct: _Struct, value: Any, told: list[bool]) -> Any:
        if isinstance(value, list):
            return [self._clean(struct, item, told) for item in value]
        if not isinstance(value, dict) or not struct.uniform:
            return value
        children = struct.children
        kept = {
            key: self._clean(children[key], item, told) if isinstance(item, (dict, list)) else item
            for key, item in value.items()
            if item is not None
        }
        told[0] |= len(kept) < len(value) and not is_turn(value)
        return kept


def find_padding(rows: Iterable[Mapping[str, Any]]) -> Padding | None:
    """The padding of a file with these rows; nothing where its nulls are its author's.

    Arrow wrote a struct if all objects at its path, and at every path above it, have the same keys in the same order.
    The nulls in such structs are padding if the file proves it once: a null under a schema's `properties`; a turn's key
    other than its text that is null in one turn and not in another; arguments of one function that are null in all
    calls of another.
    """
    root = _Struct()
    for number, values in enumerate(rows):
        try:
            root.see(values)
        except RecursionError:  # Arrow writes nothing of that depth
            return None
        if not root.uniform or (number % _BATCH == 0 and root.children and _none_is_uniform(root)):
            return None
    return Padding(root) if root.proves() else None


def _none_is_uniform(root: _Struct) -> bool:
    return not any(child.uniform for child in root.children.values())
