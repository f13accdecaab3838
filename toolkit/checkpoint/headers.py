"""What a safetensors file's header says of its tensors: the one place that reads one.

`safetensors.safe_open` says whether a header is valid, but not where a tensor's bytes lie, and of a file that was cut
short not by how much. No weight is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from toolkit.errors import ModelError, first_line

__all__ = ["Header", "Placed", "headers_in", "raw_header", "read_header"]

_MOST_BYTES = 100 << 20
"""Of a header; safetensors reads none that is longer."""
_WRONG = (
    *(OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError),
    *(ArithmeticError, RecursionError),  # an endless number, brackets without end
)


@dataclass(frozen=True)
class Header:
    """What a header says of one tensor; `dtype` as safetensors calls it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Placed(Header):
    """Of a tensor in a file that is here: its bytes begin at `offset` of `path`."""

    path: Path
    offset: int


def raw_header(path: Path, most: int = _MOST_BYTES) -> bytes:
    """The JSON that a file begins with, as it stands there and at most `most` bytes of it; nothing is checked."""
    with path.open("rb") as stream:
        return stream.read(min(int.from_bytes(stream.read(8), "little"), most))


def read_header(path: Path, advice: str = "download it again", most: int = _MOST_BYTES) -> dict[str, Placed]:
    """The tensors of a file by name, in the header's order. Made for files of strangers too.

    Args:
        advice: what to do about a file that is wrong, for the error. most: bytes that its header may have.

    Raises:
        ModelError: not a safetensors file, one cut short, or one whose header safetensors itself refuses.
    """
    try:
        size, text = path.stat().st_size, raw_header(path, most + 1)
        if len(text) > most:
            raise ValueError(f"its header is longer than {most} bytes")
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {name: _placed(name, entry, path, 8 + len(text)) for name, entry in header.items()}
        whole = max((tensor.offset + tensor.bytes for tensor in found.values()), default=8 + len(text))
        if whole == size:
            with safe_open(path, framework="np"):
                return found
    except _WRONG as error:
        raise ModelError(f"{path}: not a safetensors file ({first_line(error)[:120]}); {advice}") from None
    raise ModelError(f"{path}: damaged, {size} bytes where its header says {whole}; {advice}")


def headers_in(folder: Path, advice: str = "download it again") -> dict[str, Placed]:
    """The tensors of every safetensors file of a folder, by name.

    Raises:
        ModelError: as `read_header`.
    """
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in read_header(path, advice).items()
    }


def _placed(name: str, entry: dict[str, Any], path: Path, begin: int) -> Placed:
    first, last = entry["data_offsets"]
    return Placed(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), last - first, path, begin + first)
