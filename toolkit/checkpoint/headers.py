"""What a checkpoint's safetensors headers say of every tensor, in a folder, in the Hub's cache, or on the Hub.

`safetensors.safe_open` maps a file and says nothing of its size; a plan needs a shard that was cut short to be named.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ModelError, first_line

__all__ = ["Header", "check_shards", "stored_headers", "whole_snapshot"]

_MOST_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class Header:
    """What a safetensors header says of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def stored_headers(name_or_path: str, revision: str = "main") -> list[Header]:
    """Of every tensor in the checkpoint; of one on the Hub nothing but the headers is fetched.

    Raises:
        ModelError: no safetensors there, or a shard is missing or damaged. HubError: the Hub does not give them.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return check_shards(folder)
    from toolkit.checkpoint.remote import hub_headers

    return list(hub_headers(name_or_path, revision))


def whole_snapshot(name: str, revision: str = "main") -> Path | None:
    """The folder of a whole checkpoint in the Hub's cache, None where it is not there; asks nobody.

    The cache's place is spelt out as huggingface_hub finds it: a plan does not wait for that import.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = Path(os.environ.get("HF_HOME") or Path(caches) / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    named = cache / "refs" / revision
    commit = named.read_text(encoding="utf-8").strip() if named.is_file() else revision
    folder = cache / "snapshots" / commit
    try:
        return folder if check_shards(folder) else None
    except ModelError:  # not downloaded yet, or not to the end
        return None


def check_shards(folder: Path) -> list[Header]:
    """What the headers say of every tensor in a local checkpoint, after checking that its files are there and whole.

    Raises:
        ModelError: a shard is missing, cut short or not safetensors; or there is none at all.
    """
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of shards ({first_line(error)}); download it again") from None
    if missing := sorted({*map(str, listed)} - {file.name for file in files}):
        raise ModelError(f"{folder}: lacks the shard {missing[0]} ({len(missing)} missing); download it again")
    if not files:
        raise ModelError(f"{folder}: no .safetensors file in this folder; other formats are not read")
    return [entry for file in files for entry in _read_header(file)]


def _read_header(file: Path) -> list[Header]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_MOST_HEADER_BYTES, size):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        whole = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = [_header(name, entry) for name, entry in entries.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: not a safetensors file ({first_line(error)}); download it again") from None
    if whole != size:
        raise ModelError(f"{file}: damaged, {size} bytes where its header says {whole}; download it again")
    return found


def _header(name: str, entry: dict[str, Any]) -> Header:
    first, last = entry["data_offsets"]
    return Header(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), last - first)
