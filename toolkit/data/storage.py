"""Data sets that do not fit in memory: a list that goes on in a file, the table of tokens, and the folder for both.

`shelve` and SQLite store by key, with an index on disk and a file that a killed run leaves behind; what is needed here
is to append, and to read by number. `Dataset.from_generator` would write every data set into the user's cache and keep
it there. `tempfile.TemporaryDirectory` leaves gigabytes behind a process that was killed, and its place is often held
in memory itself (`/tmp` as tmpfs).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import pickle
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, overload

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import MemoryMappedTable
from numpy.typing import NDArray

from toolkit.data.encode import Encoded
from toolkit.errors import ResourceError
from toolkit.labels import IGNORED

__all__ = [
    "Spool",
    "View",
    "are_pairs",
    "chosen",
    "count_trained",
    "desirable",
    "first_trained",
    "largest_ids",
    "prompts_and_answers",
    "scratch_folder",
    "scratch_parent",
    "sequence_lengths",
    "token_table",
    "tokens_in",
]

_FOLDER_PREFIX = f"onecard-data-{os.getuid()}-"
_LARGE = Path("/var/tmp")
"""Where systemd's file-hierarchy(7) wants large temporary files; it is on disk."""

T = TypeVar("T")
_SPOOL_IN_MEMORY = 32 << 20
_BUFFER = 1 << 20

_CHUNK = 512
_TABLE_IN_MEMORY = 64 << 20
"""Bytes of a table from which on it is a file."""
_TOKEN = 8
"""Bytes of a token and its label."""
_LIST = pa.list_(pa.int32())
_SCHEMA = pa.schema({"input_ids": _LIST, "labels": _LIST, "place": pa.string(), "desirable": pa.bool_()})


def scratch_parent() -> Path:
    """`TMPDIR` where it is set, else a temporary folder on disk, else Python's choice."""
    if not os.environ.get("TMPDIR") and os.access(_LARGE, os.W_OK | os.X_OK):
        return _LARGE
    return Path(tempfile.gettempdir())


def scratch_folder() -> Path:
    """A folder for this process's large files, removed at its end; those of killed processes are removed first.

    Raises:
        ResourceError: it cannot be made.
    """
    return Path(_locked_folder().name)


@cache  # which keeps it until the process ends
def _locked_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder whose lock is held until the process ends, however it does."""
    try:
        for old in scratch_parent().glob(f"{_FOLDER_PREFIX}*"):
            _remove_left_behind(old)
        while True:
            folder = tempfile.TemporaryDirectory(
                prefix=_FOLDER_PREFIX, dir=scratch_parent(), ignore_cleanup_errors=True
            )
            with contextlib.suppress(FileNotFoundError):
                fcntl.flock(os.open(folder.name, os.O_RDONLY), fcntl.LOCK_EX)
            if Path(folder.name).is_dir():  # else another process took it for left behind before it was locked
                return folder
    except OSError as error:
        raise _no_room(error) from None


def _remove_left_behind(folder: Path) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _no_room(error: OSError) -> ResourceError:
    """The one line for a disk that does not take the examples."""
    return ResourceError(
        f"{scratch_parent()}: no room for the examples ({error.strerror or error}); free some, or set TMPDIR to a "
        "folder with room"
    )


class Spool(Sequence[T]):
    """Items in the order in which they were appended.

    Args:
        size: about the bytes that an item takes in memory.
        in_memory: bytes of the items that stay as they are; each further item takes 8.
        pack, unpack: an item to plain values that pickle stores well, and back.
    """

    def __init__(
        self,
        size: Callable[[T], int],
        in_memory: int = _SPOOL_IN_MEMORY,
        pack: Callable[[T], Any] = lambda item: item,
        unpack: Callable[[Any], T] = lambda stored: stored,
    ) -> None:
        self._held: list[T] = []
        self._size, self._left = size, in_memory
        self._pack, self._unpack = pack, unpack
        self._file: Any = None
        self._ends = array("Q", [0])
        self._buffer = bytearray()

    def append(self, item: T) -> None:
        """Add an item at the end.

        Raises:
            ResourceError: there is no room for the file.
        """
        if self._left > 0:
            self._left -= self._size(item)
            self._held.append(item)
            return
        stored = pickle.dumps(self._pack(item), pickle.HIGHEST_PROTOCOL)
        self._buffer += stored
        self._ends.append(self._ends[-1] + len(stored))
        if len(self._buffer) >= _BUFFER:
            self._write()

    def __len__(self) -> int:
        return len(self._held) + len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index < len(self._held):
            return self._held[index]
        if self._buffer:
            self._write()
        number = index - len(self._held)
        start, end = self._ends[number], self._ends[number + 1]
        stored = os.pread(self._file.fileno(), end - start, start)
        return self._unpack(pickle.loads(stored))  # noqa: S301 - what this object wrote, into a file without a name

    def __iter__(self) -> Iterator[T]:
        return (self[index] for index in range(len(self)))

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0, dir=scratch_parent())  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            left = memoryview(bytes(self._buffer))
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise _no_room(error) from None
        self._buffer.clear()


class View(Sequence[T]):
    """Some items of a sequence, by their numbers, 8 bytes each."""

    def __init__(self, items: Sequence[T], numbers: Sequence[int] | NDArray[np.int64]) -> None:
        self._items = items
        self._numbers = np.asarray(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._items[int(number)] for number in self._numbers[index]]
        return self._items[int(self._numbers[index])]

    def __iter__(self) -> Iterator[T]:
        return (self._items[int(number)] for number in self._numbers)


def chosen(items: Sequence[T], flags: Sequence[bool] | NDArray[np.bool_]) -> Sequence[T]:
    """The items whose flag is set; as a list where `items` is one."""
    if isinstance(items, list):
        return [item for item, flag in zip(items, flags, strict=True) if flag]
    return View(items, np.flatnonzero(flags))


def token_table(encoded: Iterator[Encoded], tokens: int) -> tuple[datasets.Dataset, Sequence[str]]:
    """The columns `input_ids` and `labels`, both (T,), IGNORED where not trained; and where each example came from.

    Of answers that are called good or bad there is a column `desirable`, too.

    Arrow lists made from arrays take a tenth of Python integers. In batches, since one list array holds at most 2³¹
    tokens. The fingerprint is a hash of the content: `Dataset` would pickle all of it to make one.

    Args:
        encoded: the examples. tokens: of all together.

    Raises:
        ResourceError: there is no room for the file.
    """
    first = next(encoded)
    encoded, judged = itertools.chain([first], encoded), ["desirable"] if first.desirable is not None else []
    digest = hashlib.blake2b(digest_size=8)
    batches = (_batch(chunk, digest) for chunk in iter(lambda: list(itertools.islice(encoded, _CHUNK)), []))
    if tokens * _TOKEN <= _TABLE_IN_MEMORY:
        table = datasets.table.InMemoryTable.from_batches(list(batches), _SCHEMA)
    else:
        table = _mapped(batches)
    rows, places = (
        datasets.Dataset(table.select(names), fingerprint=digest.hexdigest())
        for names in (["input_ids", "labels", *judged], ["place"])
    )
    return rows, places["place"]


def _batch(chunk: list[Encoded], digest: Any) -> pa.RecordBatch:
    ids = [each.ids for each in chunk]
    labels = [np.where(each.trained, each.ids, np.int32(IGNORED)) for each in chunk]
    columns = [_lists(ids), _lists(labels)]
    for column in columns:
        digest.update(np.asarray([len(each) for each in ids]).tobytes())
        digest.update(column.flatten().to_numpy().tobytes())
    beside = [pa.array([each.place for each in chunk], pa.string()), pa.array([e.desirable for e in chunk], pa.bool_())]
    digest.update(str([each.desirable for each in chunk]).encode() if chunk[0].desirable is not None else b"")
    return pa.record_batch([*columns, *beside], schema=_SCHEMA)


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
        raise _no_room(error) from None
    return MemoryMappedTable.from_file(path)


def are_pairs(rows: datasets.Dataset) -> bool:
    """Whether rows of preferences are chosen and rejected answers in turn."""
    return "desirable" not in rows.column_names


def desirable(rows: datasets.Dataset) -> NDArray[np.bool_]:
    """Whether each row of preferences is a good answer, (rows,)."""
    found: NDArray[np.bool_] = (
        np.arange(len(rows)) % 2 == 0 if are_pairs(rows) else np.asarray(rows["desirable"], dtype=bool)
    )
    return found


def sequence_lengths(rows: datasets.Dataset) -> NDArray[np.int64]:
    """The tokens of each row, (rows,)."""
    return _of_each(rows, "input_ids", lambda column: column.value_lengths().to_numpy(zero_copy_only=False))


def largest_ids(rows: datasets.Dataset) -> NDArray[np.int64]:
    """The largest token id of each row, (rows,); each row has a token."""
    return _of_each(rows, "input_ids", lambda column: np.maximum.reduceat(_values(column), _starts(column)))


def tokens_in(rows: datasets.Dataset, ids: Sequence[int]) -> set[int]:
    """Those of the token ids that a row has."""
    table, found = rows.with_format("arrow")[:], set[int]()
    for chunk in table.column("input_ids").chunks:
        values = _values(chunk)
        found |= {int(number) for number in values[np.isin(values, np.asarray(ids))]}
    return found


def _values(column: pa.ListArray) -> NDArray[np.int64]:
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False))


def _starts(column: pa.ListArray) -> NDArray[np.int64]:
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)


def count_trained(rows: datasets.Dataset) -> NDArray[np.int64]:
    """How many tokens of each row carry a label, (rows,)."""
    return _of_each(rows, "labels", _labelled)


def first_trained(rows: datasets.Dataset) -> NDArray[np.int64]:
    """Where in each row the first label stands, (rows,); each row has one."""
    return _of_each(rows, "labels", _first)


def _first(column: pa.ListArray) -> NDArray[np.int64]:
    ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
    places = np.flatnonzero(column.flatten().to_numpy() != IGNORED)
    starts = np.concatenate([[0], ends[:-1]])
    found: NDArray[np.int64] = places[np.searchsorted(places, starts)] - starts
    return found


def _labelled(column: pa.ListArray) -> NDArray[np.int64]:
    ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
    counts = np.concatenate([[0], np.cumsum(column.flatten().to_numpy() != IGNORED)])
    found: NDArray[np.int64] = np.diff(counts[ends], prepend=0)
    return found


def _of_each(rows: datasets.Dataset, name: str, count: Any) -> NDArray[np.int64]:
    tables = rows.with_format("arrow").select_columns([name]).iter(10_000) if len(rows) else ()
    found = [count(chunk) for table in tables for chunk in table.column(name).chunks]
    return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)


def prompts_and_answers(pairs: datasets.Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of each pair's prompt, and of both answers together (pairs,); rows 2n and 2n+1 are a pair."""
    prompts = first_trained(pairs).reshape(-1, 2).min(1)
    return prompts, sequence_lengths(pairs).reshape(-1, 2).sum(1) - 2 * prompts
