"""The pages of a checkpoint's mapped files, fetched by threads before their turn, so that reading and rounding overlap.

A mapped file is read where it is first touched: the disk waits while a weight is rounded, and the rounding waits while
the disk reads. transformers' loader threads do not help, since they hand out mapped tensors and touch nothing.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from toolkit.checkpoint.weights import Unread

__all__ = ["ReadAhead"]

_AHEAD = 256 << 20
"""Bytes fetched before their use: so few that the page cache of a small machine still holds them then."""
_CHUNK = 4 << 20
_READERS = 2


class ReadAhead:
    """Touches the pages of mapped tensors in the order given, at most `_AHEAD` bytes before their use.

    Nothing waits for it: a page that is not there yet is read by whoever uses it, and the threads end with this object.

    Args:
        sources: what gives a mapped tensor when it is indexed with `[...]`, such as safetensors' slices.
    """

    def __init__(self, sources: Iterable[Any]) -> None:
        self._chunks = _chunks(sources)
        self._pool = ThreadPoolExecutor(_READERS, "onecard-read-ahead")
        self._ahead = 0
        self.used(0)

    def used(self, size: int) -> None:
        """So many bytes, next in order, have had their use; as many more are fetched."""
        self._ahead -= size
        while self._ahead < _AHEAD and (chunk := next(self._chunks, None)) is not None:
            self._ahead += chunk.numel()
            self._pool.submit(_touch, chunk)


def _chunks(sources: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Their bytes, a part at a time; what is not contiguous is no mapped file."""
    for source in sources:
        part = source[...]
        for tensor in part.pages() if isinstance(part, Unread) else (part,):
            if tensor.is_contiguous():
                yield from tensor.reshape(-1).view(torch.uint8).split(_CHUNK)


def _touch(chunk: torch.Tensor) -> None:
    """By numpy: in a forked process torch makes its thread pool anew, which two threads must not do at once."""
    chunk.numpy()[:: mmap.PAGESIZE].max()
