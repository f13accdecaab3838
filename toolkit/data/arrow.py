"""Arrow's values as the Python values that their writer meant: structs without filled-in nulls, JSON parsed.

`datasets` decodes its `Json` columns, but leaves the nulls that a struct is filled up with, and Parquet is read here
without it. The schema says which is which: a null in a struct is padding, a null in JSON is its author's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from toolkit.data.padding import is_turn
from toolkit.data.problems import InvalidRow

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ArrowValues"]

_Read = Callable[[Any], Any] | None  # None: the value is what it is


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
        told = not is_turn(readers)

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
        return json.loads(value)
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
