"""A checkpoint's tensors by its headers, where its files are whole: in a folder, in the Hub's cache, or on the Hub.

Found without huggingface_hub where that is not asked: a plan does not wait for its import.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from toolkit.checkpoint.files import INDEX, shards_of
from toolkit.checkpoint.headers import Header, Placed, headers_in
from toolkit.errors import ModelError

__all__ = ["check_shards", "stored_headers", "whole_snapshot"]


def stored_headers(name_or_path: str | Path, revision: str = "main") -> Sequence[Header]:
    """Of every tensor in the checkpoint; of one on the Hub nothing but the headers is fetched.

    Raises:
        ModelError: no safetensors there, or a shard is missing or damaged. HubError: the Hub does not give them.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return check_shards(folder)
    from toolkit.checkpoint.remote import hub_headers

    return list(hub_headers(str(name_or_path), revision))


def whole_snapshot(name: str, revision: str = "main") -> Path | None:
    """The folder of a whole checkpoint in the Hub's cache, None where it is not there; asks nobody.

    The cache's place is spelt out as huggingface_hub finds it.
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


def check_shards(folder: Path) -> list[Placed]:
    """What the headers say of every tensor in a folder, after checking that its files are there and whole.

    Raises:
        ModelError: a shard is missing, cut short or not safetensors; or there is none at all.
    """
    if (folder / INDEX).is_file():
        shards_of(folder)
    found = list(headers_in(folder).values())
    if not found:
        raise ModelError(f"{folder}: no .safetensors file in this folder; other formats are not read")
    return found
