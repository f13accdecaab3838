"""Folders that `save_to_disk` of a `Dataset` or a `DatasetDict` wrote: which they are, and their rows; Arrow files.

Beside Arrow files they hold JSON that says how these are read; a reader of JSON files would take that for rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["arrow_rows", "describes_data", "is_saved", "lists_saved", "saved_around", "saved_rows"]

_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"
_DESCRIBE = (_INFO, "dataset_infos.json", _DICT)
_IPC_FILE = b"ARROW1"
"""How an Arrow file begins that is no stream."""


def is_saved(folder: Path) -> bool:
    """Whether this folder is one saved data set."""
    return (folder / _STATE).is_file() and (folder / _INFO).is_file()


def saved_around(path: Path) -> Path | None:
    """The saved data set that a file is a part of."""
    is_part = path.name in (_STATE, _INFO) or path.suffix == ".arrow"
    return path.parent if is_part and is_saved(path.parent) else None


def lists_saved(path: Path) -> bool:
    """Whether a file is the list of the saved data sets beside it."""
    return path.name == _DICT and any(is_saved(folder) for folder in path.parent.iterdir())


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


def arrow_rows(path: Path) -> tuple[pa.Schema, Iterator[Mapping[str, Any]]]:
    """The schema and rows of an Arrow file on its own: a stream, as `datasets` caches, or a file, as Feather.

    Raises:
        DataError: it is neither, or ends too early.
    """
    import pyarrow as pa

    refused = f"{path}: not readable as Arrow; write it again, or with to_json or to_parquet"
    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(len(_IPC_FILE)) == _IPC_FILE
        opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
        schema = opened(pa.memory_map(str(path))).schema
    except (pa.ArrowException, OSError):
        raise DataError(refused) from None

    def rows() -> Iterator[Mapping[str, Any]]:
        try:
            with pa.memory_map(str(path)) as source:
                reader = opened(source)
                batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
                for batch in batches:
                    for start in range(0, batch.num_rows, 1024):
                        yield from batch.slice(start, 1024).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            raise DataError(refused) from None

    return schema, rows()
