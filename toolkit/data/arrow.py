"""Values that went through Arrow, as their writer meant them: structs without filled-in nulls, JSON parsed.

Arrow gives every struct the keys of all its rows, and `datasets` and `Dataset.to_json` leave those nulls in. A schema
says which is which: a null in a struct is padding, a null in JSON is its author's. A JSON file has no schema and no
library tells them apart: there the keys' sameness does, and nulls that nobody writes by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from toolkit.data.problems import JSON, InvalidRow

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ArrowValues", "Padding", "find_padding"]

_BATCH = 256
_UNSURE = ("content", "value", "text")
"""Keys of a message that hand-written files leave null, too, beside tool calls."""

_Read = Callable[[Any], Any] | None  # None: the value is what it is


def _is_turn(keys: Iterable[str]) -> bool:
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
        if _is_turn(self.keys or ()) and mixed.difference(_UNSURE):
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
        told[0] |= len(kept) < len(value) and not _is_turn(value)
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


class ArrowValues:
    """Reads the rows of one schema.

    Args:
        schema: Arrow's, with the metadata that `datasets` writes where it did.
        decoded: whether JSON columns hold values already, as `datasets` gives them, or JSON text, as a file does.
    """

    def __init__(self, schema: pa.Schema, *, decoded: bool) -> None:
        features = _features(schema)
        self._decoded = decoded
        self._padded = False
        self._columns = {field.name: self._reader(field.type, features.get(field.name)) for field in schema}

    def read(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """The row, and whether nulls were taken out of it anywhere but beside a turn's own keys.

        Raises:
            InvalidRow: a JSON column holds text that is not JSON.
        """
        self._padded = False
        read = self._columns
        kept = {
            name: reader(value) if (reader := read.get(name)) else value
            for name, value in values.items()
            if value is not None
        }
        return kept, self._padded

    def _reader(self, kind: pa.DataType, feature: Any) -> _Read:
        import pyarrow as pa

        if isinstance(kind, pa.JsonType) or _is_json(feature):
            return None if self._decoded else _parse
        if pa.types.is_struct(kind):
            inner = feature if isinstance(feature, dict) else {}
            return self._struct({field.name: self._reader(field.type, inner.get(field.name)) for field in kind})
        if pa.types.is_map(kind):
            return _map(self._reader(kind.item_type, None))
        value_type = getattr(kind, "value_type", None)
        if value_type is None or pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            return None
        return _list(self._reader(value_type, _inner(feature)))

    def _struct(self, readers: Mapping[str, _Read]) -> Callable[[Any], Any]:
        told = not _is_turn(readers)

        def read(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            kept = {
                name: reader(item) if (reader := readers.get(name)) else item
                for name, item in value.items()
                if item is not None
            }
            self._padded |= told and len(kept) < len(value)
            return kept

        return read


def _list(reader: _Read) -> _Read:
    if reader is None:
        return None
    return lambda value: [reader(item) for item in value] if isinstance(value, list) else value


def _map(reader: _Read) -> Callable[[Any], Any]:
    """Arrow gives a map as pairs."""
    return lambda value: {key: reader(item) if reader else item for key, item in value} if value is not None else None


def _parse(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return JSON.decode(value)
    except (ValueError, RecursionError):
        raise InvalidRow("not JSON", "a JSON column holds text that is not JSON; write the file again") from None


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """What `datasets` wrote about the columns: other writers keep that, but turn the JSON type into text."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _is_json(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "Json"


def _inner(feature: Any) -> Any:
    """The feature of a list's items; older versions write a list of one, or a `Sequence`."""
    if isinstance(feature, list) and feature:
        return feature[0]
    return feature.get("feature") if isinstance(feature, dict) else None
