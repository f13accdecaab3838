"""Encoded examples as one table of tokens, labels and places, in memory or, beyond a size, in a file that is mapped.

`Dataset.from_generator` would write every data set into the user's cache and keep it there.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import MemoryMappedTable
from numpy.typing import NDArray

from toolkit.data.encode import Encoded
from toolkit.data.scratch import no_room, scratch_folder
from toolkit.labels import IGNORED

__all__ = ["count_trained", "sequence_lengths", "token_table"]

_CHUNK = 512
_MOST_IN_MEMORY = 64 << 20
"""Bytes of a table from which on it is a file."""
_TOKEN = 8
"""Bytes of a token and its label."""
_LIST = pa.list_(pa.int32())
_SCHEMA = pa.schema({"input_ids": _LIST, "labels": _LIST, "place": pa.string()})


def token_table(encoded: Iterator[Encoded], tokens: int) -> tuple[datasets.Dataset, Sequence[str]]:
    """The columns `input_ids` and `labels`, both (T,), IGNORED where not trained; and where each example came from.

    Arrow lists made from arrays take a tenth of Python integers. In batches, since one list array holds at most 2³¹
    tokens. The fingerprint is a hash of the content: `Dataset` would pickle all of it to make one.

    Args:
        encoded: the examples. tokens: of all together.

    Raises:
        ResourceError: there is no room for the file.
    """
    digest = hashlib.blake2b(digest_size=8)
    batches = (_batch(chunk, digest) for chunk in iter(lambda: list(itertools.islice(encoded, _CHUNK)), []))
    if tokens * _TOKEN <= _MOST_IN_MEMORY:
        table = datasets.table.InMemoryTable.from_batches(list(batches), _SCHEMA)
    else:
        table = _mapped(batches)
    rows, places = (
        datasets.Dataset(table.select(names), fingerprint=digest.hexdigest())
        for names in (["input_ids", "labels"], ["place"])
    )
    return rows, places["place"]


def _batch(chunk: list[Encoded], digest: Any) -> pa.RecordBatch:
    ids = [each.ids for each in chunk]
    labels = [np.where(each.trained, each.ids, np.int32(IGNORED)) for each in chunk]
    columns = [_lists(ids), _lists(labels)]
    for column in columns:
        digest.update(np.asarray([len(each) for each in ids]).tobytes())
        digest.update(column.flatten().to_numpy().tobytes())
    return pa.record_batch([*columns, pa.array([each.place for each in chunk], pa.string())], schema=_SCHEMA)


def _lists(arrays: list[NDArray[np.int32]]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays).astype(np.int32)))


def _mapped(batches: Iterator[pa.RecordBatch]) -> MemoryMappedTable:
    """The batches from a file; what `datasets` makes of the table goes into files beside it."""
    try:
        number, path = tempfile.mkstemp(suffix=".arrow", dir=scratch_folder())
        os.close(number)
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as out:
            for batch in batches:
                out.write_batch(batch)
    except OSError as error:
        raise no_room(error) from None
    return MemoryMappedTable.from_file(path)


def sequence_lengths(rows: datasets.Dataset) -> NDArray[np.int64]:
    """The tokens of each row, (rows,)."""
    return _of_each(rows, "input_ids", lambda column: column.value_lengths().to_numpy(zero_copy_only=False))


def count_trained(rows: datasets.Dataset) -> NDArray[np.int64]:
    """How many tokens of each row carry a label, (rows,)."""
    return _of_each(rows, "labels", _labelled)


def _labelled(column: pa.ListArray) -> NDArray[np.int64]:
    ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
    counts = np.concatenate([[0], np.cumsum(column.flatten().to_numpy() != IGNORED)])
    found: NDArray[np.int64] = np.diff(counts[ends], prepend=0)
    return found


def _of_each(rows: datasets.Dataset, name: str, count: Any) -> NDArray[np.int64]:
    tables = rows.with_format("arrow").select_columns([name]).iter(10_000) if len(rows) else ()
    found = [count(chunk) for table in tables for chunk in table.column(name).chunks]
    return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)
