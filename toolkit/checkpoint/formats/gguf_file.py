"""A GGUF file's metadata and tensors, unread, from a header that nobody vouches for.

The `gguf` library's own reader trusts every count and length in the file: it allocates what they say, and takes tensors
that lie outside of the file or over each other. Here a header is walked once, inside its own bytes.
Layout: ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import torch

from toolkit.errors import ModelError, RecipeError, first_line

__all__ = ["GgufFile", "Slice", "Stored", "Strings", "library", "open_gguf", "read_header"]

_LONGEST_HEADER = 128 * 2**20
"""Bytes. The largest vocabularies with their merges take 20 MiB."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _MOST_DIMENSIONS = 8, 9, 4

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""Types that hold numbers and no blocks."""


class Strings(Sequence[str]):
    """An array of strings that is decoded as it is indexed: a vocabulary is long, and rarely wanted."""

    def __init__(self, data: bytes, ends: np.ndarray) -> None:
        self._data, self._ends = data, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start = int(self._ends[place - 1]) + 8 if place else 8
        return self._data[start : int(self._ends[place])].decode("utf-8", "replace")


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Args:
        name: in the file. shape: of the plain tensor, rows first, as torch has it. kind: ggml's name of its type.
        path: the file. offset: where its data begins there, in bytes. bytes: of its data.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    path: Path
    offset: int
    bytes: int

    @property
    def is_plain(self) -> bool:
        """Whether it holds floating-point numbers, and no blocks."""
        return self.kind in _PLAIN


@dataclass(frozen=True)
class GgufFile:
    """One model's file, or the parts it is split into, in order. `metadata` is that of the first part."""

    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def slice(self, key: str) -> Slice:
        """The raw tensor, unread until it is indexed."""
        return Slice(self, self.tensors[key])

    def mapped(self, path: Path) -> mmap.mmap:
        """The bytes of one of the files, mapped. Raises `ModelError` where it is gone or shorter than it was."""
        try:
            if path not in self._mapped:
                size = max(t.offset + t.bytes for t in self.tensors.values() if t.path == path)
                with path.open("rb") as file:
                    self._mapped[path] = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            _refuse(path, f"cannot be read any more: {first_line(error)}")
        return self._mapped[path]

    @cached_property
    def _mapped(self) -> dict[Path, mmap.mmap]:
        return {}


class Slice:
    """A raw tensor of a file, mapped and unread, as safetensors' slices are.

    Numbers have their own dtype; blocks are bytes, uint8, with the last axis in bytes.
    """

    def __init__(self, file: GgufFile, stored: Stored) -> None:
        self._file, self._stored = file, stored

    def get_shape(self) -> list[int]:
        """As stored: of a block type, the last axis counts bytes."""
        shape = list(self._stored.shape)
        if not self._stored.is_plain:
            shape[-1] = self._stored.bytes // math.prod(shape[:-1])
        return shape

    def get_dtype(self) -> str:
        """ggml's name of its type."""
        return self._stored.kind

    def __getitem__(self, index: Any) -> torch.Tensor:
        """That part, mapped. Raises `ModelError` where the file is gone or shorter than it was."""
        stored, shape = self._stored, self.get_shape()
        # Of its own storage: autograd counts changes by storage, and a model's parameters are changed one by one.
        data = torch.frombuffer(
            self._file.mapped(stored.path),
            dtype=_PLAIN.get(stored.kind, torch.uint8),
            count=math.prod(shape),
            offset=stored.offset,
        )
        return data.view(shape)[index]


def library() -> Any:
    """The `gguf` library, an extra. Raises `RecipeError` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise RecipeError("the gguf library is not installed: pip install 'onecard[gguf]'") from None
    return gguf


def open_gguf(path: Path) -> GgufFile:
    """The headers of the model at `path`: a .gguf file, any part of a split one, or a folder with one such model.

    Raises:
        ModelError: no such file, a damaged or hostile header, a part of a split file is missing or another model's.
        RecipeError: the `gguf` library is not installed.
    """
    first = read_header(_only_model(path) if path.is_dir() else path)
    count = first.metadata.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return first
    parts = [read_header(part) for part in _parts(first.files[0], count)]
    tensors: dict[str, Stored] = {}
    for number, part in enumerate(parts):
        if (part.metadata.get("split.count"), part.metadata.get("split.no")) != (count, number):
            _refuse(part.files[0], f"it does not say that it is part {number + 1} of {count}")
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            _refuse(part.files[0], f"{twice[0]} is in an earlier part as well")
        tensors |= part.tensors
    wanted = parts[0].metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        _refuse(parts[0].files[0], f"its {count} parts hold {len(tensors)} tensors of {wanted}")
    return GgufFile(tuple(part.files[0] for part in parts), parts[0].metadata, MappingProxyType(tensors))


_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def _only_model(folder: Path) -> Path:
    found = sorted(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))
    models = {match["stem"] if (match := _PART.fullmatch(path.name)) else path.name: path for path in found}
    if len(models) != 1:
        names = ", ".join(list(models)[:4]) or "none"
        raise ModelError(f"{folder}: {len(models)} GGUF models there ({names}); name one file")
    return next(iter(models.values()))


def _parts(path: Path, count: int) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        _refuse(
            path, f"one of {count} parts, but not named …-00001-of-{count:05}.gguf; give the files their names back"
        )
    parts = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise ModelError(f"{part}: missing, of {count} parts; put all parts into one folder")
    return parts


def read_header(path: Path) -> GgufFile:
    """One file's header. Raises as `open_gguf` does."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _Walk(path, mapped).header()
    except (OSError, ValueError) as error:  # no such file, a folder, or an empty one
        _refuse(path, first_line(error))


class _Walk:
    """Goes through a header from front to back, never past its end."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path, self.mapped, self.place = path, mapped, 0
        self.size = len(mapped)
        self.end = min(self.size, _LONGEST_HEADER)

    def header(self) -> GgufFile:
        if self.take(4) != b"GGUF":
            _refuse(self.path, "not a GGUF file")
        version = self.number("I")
        if version not in (2, 3):
            why = "big-endian" if version & 0xFFFF == 0 else f"version {version}, this reads 2 and 3"
            _refuse(self.path, f"a GGUF file that cannot be read: {why}")
        tensors, entries = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.name("a metadata key", metadata)
            metadata[key] = self.value(key, self.number("I"))
        found: dict[str, Stored] = {}
        for _ in range(tensors):
            tensor = self.tensor(found)
            found[tensor.name] = tensor
        return GgufFile((self.path,), MappingProxyType(metadata), MappingProxyType(self.placed(metadata, found)))

    def take(self, count: int) -> bytes:
        start = self.place
        self.skip(count)
        return self.mapped[start : self.place]

    def skip(self, count: int) -> None:
        if count > self.end - self.place:
            limit = "the end of the file" if self.end == self.size else f"{_LONGEST_HEADER >> 20} MiB"
            _refuse(self.path, f"its header runs past {limit}; download it again")
        self.place += count

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def name(self, what: str, known: Mapping[str, Any]) -> str:
        data = self.take(self.number("Q"))
        try:
            name = data.decode("utf-8")
        except UnicodeDecodeError:
            name = ""
        if not name or not name.isprintable() or len(data) > 2**16:
            _refuse(self.path, f"{what} is no name: {data[:40]!r}")
        if name in known:
            _refuse(self.path, f"{what} is there twice: {name[:80]}")
        return name

    def value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            value = self.number(_SCALARS[kind])
            return float(str(np.float32(value))) if kind == 6 else value
        if kind == _STRING:
            return self.take(self.number("Q")).decode("utf-8", "replace")
        if kind != _ARRAY:
            _refuse(self.path, f"{key[:80]} has the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            return np.frombuffer(
                self.take(count * struct.calcsize(f"<{code}")), np.dtype(f"<{code}" if code != "?" else "?")
            )
        if kind != _STRING:
            _refuse(self.path, f"{key[:80]} is an array of the unknown type {kind}")
        return self.strings(count)

    def strings(self, count: int) -> Strings:
        start = self.place
        self.skip(count * 8)  # each has at least its length, so the count is none to allocate by until this fits
        self.place, ends = start, np.empty(count, dtype=np.int64)
        for number in range(count):
            self.skip(self.number("Q"))
            ends[number] = self.place - start
        return Strings(self.mapped[start : self.place], ends)

    def tensor(self, known: Mapping[str, Stored]) -> Stored:
        """A tensor of the list; its offset is not yet that of the file."""
        gguf = library()
        name = self.name("a tensor's name", known)
        dimensions = self.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            _refuse(self.path, f"{name[:80]} has {dimensions} dimensions")
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        kind, offset = self.number("I"), self.number("Q")
        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            _refuse(self.path, f"{name[:80]} has the unknown type {kind}")
        if 0 in shape or shape[-1] % block or math.prod(shape) > 2**62:
            _refuse(self.path, f"{name[:80]} cannot have the shape {'×'.join(map(str, shape))}")
        stored = gguf.GGMLQuantizationType(kind).name
        return Stored(name, shape, stored, self.path, offset, math.prod(shape) // block * size)

    def placed(self, metadata: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Stored]:
        """The tensors with their places in the file, which must lie in it and apart."""
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            _refuse(self.path, f"general.alignment is {str(alignment)[:40]}, and no power of two from 8")
        start = -(-self.place // alignment) * alignment
        end = start
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset % alignment or start + tensor.offset < end:
                _refuse(self.path, f"{tensor.name[:80]} does not begin where it may")
            end = start + tensor.offset + tensor.bytes
            if end > self.size:
                _refuse(self.path, f"{tensor.name[:80]} runs past the end of the file; download it again")
        return {name: replace(tensor, offset=start + tensor.offset) for name, tensor in tensors.items()}


def _refuse(path: Path, why: str) -> NoReturn:
    raise ModelError(f"{path}: {why}")
