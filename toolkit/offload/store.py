"""Where the expert stacks of an int8 checkpoint lie in its files, and how they get into a slot.

safetensors maps files, so that every read ends in fresh pages or page faults of the thread that computes. Here bytes
are read at their offsets into memory that is used again and again, which was also faster from the disk (2.8 GB/s
against 1.9 with mapped pages, two readers each).

    E experts; a layer's image in memory is its first stack, then its second
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from toolkit.checkpoint.files import Placed, headers_in
from toolkit.errors import ModelError, ResourceError

__all__ = ["Filler", "FromFiles", "HostArena", "Layout", "Piece", "Staged"]

_CHUNK = 8 << 20
_READERS = 2
_ADVICE = "write the int8 checkpoint again"


@dataclass(frozen=True)
class Layout:
    """Shapes of a layer's two stacks, experts first, and how they follow each other in memory: int8, or bytes of two
    numbers each."""

    up: tuple[int, ...]
    down: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.int8, torch.int8)

    @property
    def bytes(self) -> int:
        """Of both."""
        return prod(self.up) + prod(self.down)

    def views(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both stacks in an image, int8 and one-dimensional."""
        first, (up, down) = prod(self.up), self.dtypes
        return image[:first].view(up).view(self.up), image[first : self.bytes].view(down).view(self.down)


@dataclass(frozen=True)
class Piece:
    """Bytes `size` at `offset` of a file and at `place` of an image."""

    path: Path
    offset: int
    place: int
    size: int


class Filler(Protocol):
    """What fills a slot; it is called by one thread at a time, never the one that computes."""

    def fill(self, image: torch.Tensor, layer: str, experts: Sequence[int] | None) -> int:
        """Put a layer, or these experts of it, into their places in `image`; gives the bytes moved."""

    def release(self, image: torch.Tensor) -> None:
        """The thread that computes has queued its last work with `image` and says so before it is filled again."""


class FromFiles:
    """The stacks of an int8 checkpoint folder, by layer.

    Args:
        stacks: layer name to the full names of its first and second stack.

    Raises:
        ModelError: a stack is not in the files, not int8, or a file is damaged.
    """

    def __init__(self, folder: Path, stacks: Mapping[str, tuple[str, str]]) -> None:
        headers = headers_in(folder, _ADVICE)
        self._where = {layer: [_rounded(folder, headers, name) for name in names] for layer, names in stacks.items()}
        dtypes = {layer: [_DTYPES[headers[name].dtype] for name in names] for layer, names in stacks.items()}
        self.layouts = {
            layer: Layout(up[2], down[2], (dtypes[layer][0], dtypes[layer][1]))
            for layer, (up, down) in self._where.items()
        }
        self._files = {path: os.open(path, os.O_RDONLY) for where in self._where.values() for path, *_ in where}
        self._readers = ThreadPoolExecutor(_READERS, "onecard-stack-reader")

    def fill(self, image: torch.Tensor, layer: str, experts: Sequence[int] | None) -> int:
        """Read into host memory.

        Raises:
            ResourceError: the disk fails, or the file has been cut short.
        """
        memory = memoryview(image.view(torch.uint8).numpy())  # type: ignore[arg-type]
        chunks = [chunk for piece in self.pieces(layer, experts) for chunk in _chunks(piece)]
        return sum(self._readers.map(lambda chunk: self._read(memory, chunk), chunks))

    def release(self, image: torch.Tensor) -> None:
        """Nothing is queued on a CPU."""

    def pieces(self, layer: str, experts: Sequence[int] | None = None) -> Iterator[Piece]:
        """Where a layer, or some of its experts, is on the disk and in an image."""
        place = 0
        for path, offset, shape in self._where[layer]:
            each = prod(shape[1:])
            if experts is None:
                yield Piece(path, offset, place, shape[0] * each)
            else:
                yield from (Piece(path, offset + e * each, place + e * each, each) for e in experts)
            place += shape[0] * each

    def _read(self, memory: memoryview, chunk: Piece) -> int:
        target, done = memory[chunk.place : chunk.place + chunk.size], 0
        while done < chunk.size:
            try:
                count = os.preadv(self._files[chunk.path], [target[done:]], chunk.offset + done)
            except OSError as error:
                raise ResourceError(f"{chunk.path}: cannot be read ({error.strerror}); is its disk there?") from None
            if not count:
                raise ResourceError(f"{chunk.path}: ends early, it was changed while in use; restore it and rerun")
            done += count
        return done


class HostArena:
    """Stacks in one piece of host memory, pinned where there is a card, so that its copy engine reads them directly."""

    def __init__(self, files: FromFiles, layers: Sequence[str]) -> None:
        sizes = {layer: files.layouts[layer].bytes for layer in layers}
        arena = torch.empty(sum(sizes.values()), dtype=torch.int8)
        if torch.cuda.is_available():  # the caching allocator for pinned memory would round up to a power of two
            status = torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), arena.nbytes, 0)
            if int(status):
                raise ResourceError(
                    f"{arena.nbytes / 2**30:.1f} GiB of host memory cannot be pinned; set placement.experts=disk"
                )
        self._images = dict(zip(sizes, arena.split(list(sizes.values())), strict=True))
        for layer, image in self._images.items():
            files.fill(image, layer, None)

    def image(self, layer: str) -> torch.Tensor | None:
        """The layer's image, None where it is not in here."""
        return self._images.get(layer)


class Staged:
    """Fills slots on a card: from the arena where a layer is in it, else through a pinned image read from the file.

    Copies run on a stream of their own, behind the event that says that the slot is no longer read.
    """

    def __init__(self, files: FromFiles, arena: HostArena, device: torch.device) -> None:
        self._files, self._arena = files, arena
        self._stream = torch.cuda.Stream(device)
        self._free: dict[int, torch.cuda.Event] = {}
        self._staging: torch.Tensor | None = None

    def fill(self, image: torch.Tensor, layer: str, experts: Sequence[int] | None) -> int:
        """Returns when the bytes are on the card; only this thread waits."""
        source = self._arena.image(layer)
        if source is None:
            source = self._staged()
            self._files.fill(source, layer, experts)
        if (free := self._free.get(image.data_ptr())) is not None:
            self._stream.wait_event(free)
        moved = 0
        with torch.cuda.stream(self._stream):
            for piece in self._files.pieces(layer, experts):
                rows = slice(piece.place, piece.place + piece.size)
                image[rows].copy_(source[rows], non_blocking=True)
                moved += piece.size
        self._stream.synchronize()
        return moved

    def release(self, image: torch.Tensor) -> None:
        """Mark the point in the computing stream after which the slot may be overwritten."""
        event = self._free.setdefault(image.data_ptr(), torch.cuda.Event())
        event.record(torch.cuda.current_stream(image.device))

    def _staged(self) -> torch.Tensor:
        if self._staging is None:
            size = max(layout.bytes for layout in self._files.layouts.values())
            self._staging = torch.empty(size, dtype=torch.int8, pin_memory=True)
        return self._staging


_DTYPES = {"I8": torch.int8, "U8": torch.uint8}

_Where = tuple[Path, int, tuple[int, ...]]


def _rounded(folder: Path, headers: Mapping[str, Placed], name: str) -> _Where:
    if name not in headers or headers[name].dtype not in _DTYPES:
        raise ModelError(f"{folder}: {name} is not there in 8 or 4 bit; {_ADVICE}")
    tensor = headers[name]
    return tensor.path, tensor.offset, tensor.shape


def _chunks(piece: Piece) -> Iterator[Piece]:
    for start in range(0, piece.size, _CHUNK):
        size = min(_CHUNK, piece.size - start)
        yield Piece(piece.path, piece.offset + start, piece.place + start, size)
