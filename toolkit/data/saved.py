"""Folders that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` wrote: which they are, and their rows.

Beside Arrow files they hold JSON that says how these are read; a reader of JSON files would take that for rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["describes_data", "is_saved", "saved_around", "saved_rows"]

_STATE, _INFO = "state.json", "dataset_info.json"
_DESCRIBE = (_INFO, "dataset_infos.json", "dataset_dict.json")


def is_saved(folder: Path) -> bool:
    """Whether this folder is one saved data set."""
    return (folder / _STATE).is_file() and (folder / _INFO).is_file()


def saved_around(path: Path) -> Path | None:
    """The saved data set that a file is a part of."""
    is_part = path.name in (_STATE, _INFO) or path.suffix == ".arrow"
    return path.parent if is_part and is_saved(path.parent) else None


def describes_data(path: Path) -> bool:
    """Whether a JSON file is one that `datasets` and tools like it put beside data, and holds no rows."""
    return path.name in _DESCRIBE


def saved_rows(folder: Path) -> tuple[pa.Schema, Iterator[Mapping[str, Any]]]:
    """The schema of a saved data set, and its rows, mapped from the disk as they are asked for.

    Raises:
        DataError: `datasets` cannot read it.
    """
    from datasets import Dataset

    try:
        rows = Dataset.load_from_disk(str(folder)).with_format(None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # pyarrow's errors are of these kinds
        raise DataError(
            f"{folder}: not readable as a data set of save_to_disk ({first_line(error)}); save it again, or write it "
            "with to_json or to_parquet"
        ) from None
    return rows.features.arrow_schema, iter(rows)
