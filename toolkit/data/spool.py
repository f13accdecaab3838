"""A list that keeps its first items in memory and the others in an unnamed file, so that a large data set fits.

`shelve` and SQLite store by key, with an index on disk and a file that a killed run leaves behind; what is needed here
is to append, and to read by number. The file has no name, so it goes with the process.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from toolkit.data.scratch import no_room, scratch_parent

__all__ = ["Spool", "View", "chosen"]

T = TypeVar("T")
_IN_MEMORY = 32 << 20
_BUFFER = 1 << 20


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
        in_memory: int = _IN_MEMORY,
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
            raise no_room(error) from None
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
