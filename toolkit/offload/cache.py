"""The int8 file that streamed stacks are read from: the checkpoint itself where it is int8, else one written once.

It is bound to the very weights it was made from, so another checkpoint under the same name gets another file, and it
appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.files import METHOD, cache_root, declared_format, gguf_at, raw_header
from toolkit.checkpoint.gguf_source import opened
from toolkit.checkpoint.identity import config_sha256, weight_files
from toolkit.checkpoint.remote import fetch
from toolkit.quant import quantize_checkpoint

__all__ = ["int8_folder"]

_FORMAT = b"onecard int8 2"
_SAMPLES, _SAMPLE = 64, 1 << 14


def int8_folder(
    name_or_path: str,
    *,
    revision: str = "main",
    dtype: torch.dtype | None = None,
    experts: str = "int8",
    stacks: Mapping[str, str] | None = None,
    root: Path | None = None,
) -> Path:
    """A folder with the checkpoint in int8, written now if it is not there; writing holds one layer in memory.

    Args:
        dtype: what weights that are not int8 are stored in, so that a run of this dtype maps them as they are.
        experts: what stacks are rounded to. stacks: int8 or int4 by stack, where they are not all that.
        root: of the cache.

    Raises:
        ResourceError: the disk is full, or another process is writing the same file.
        ModelError, HubError: as `quantize_checkpoint`.
    """
    source = fetch(name_or_path, revision)
    declared = declared_format(str(source), read_config(str(source)))
    if declared is not None and declared["quant_method"] == METHOD:
        return source
    mixture = [json.dumps(dict(stacks), sort_keys=True)] if stacks else []
    key = fingerprint(source, str(dtype), *([] if experts == "int8" else [experts]), *mixture)
    folder = (root or cache_root()) / "int8" / f"{Path(name_or_path).name}-{key}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        quantize_checkpoint(str(source), folder, dtype=dtype, experts=experts, stacks=stacks, keep_unused=False)
    return folder


def fingerprint(folder: Path, *more: str) -> str:
    """16 hex digits of a checkpoint's config, its files' headers and sizes, and of blocks all over their weights."""
    digest, is_gguf = hashlib.sha256(_FORMAT), gguf_at(folder) is not None
    for part in more:
        digest.update(part.encode())
    digest.update(config_sha256(str(folder)).encode() if is_gguf else (folder / "config.json").read_bytes())
    for path in weight_files(folder) if is_gguf else sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        digest.update(_gguf_header(path) if is_gguf else raw_header(path))
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(size * number // _SAMPLES)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _gguf_header(path: Path) -> bytes:
    """All that stands before the first tensor's data: metadata, names, types and places."""
    tensors = opened(path).file.tensors.values()
    with path.open("rb") as file:
        return file.read(min((tensor.offset for tensor in tensors if tensor.path == path), default=path.stat().st_size))
