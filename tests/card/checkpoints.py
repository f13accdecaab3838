"""A published model's checkpoint at its real size, as files that are nothing but a header and a hole."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from tests.harness.published import stored_tensors, write_surroundings

__all__ = ["hollow_checkpoint", "hollow_file"]

_PER_FILE = 5 << 30
_SIZES = {"BF16": 2, "F32": 4, "I8": 1, "U8": 1}

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def hollow_checkpoint(name: str, folder: Path) -> Path:
    """Write the checkpoint of one of `toolkit.plan.shapes.published`, by the names and dtypes that its files have."""
    folder.mkdir(parents=True, exist_ok=True)
    write_surroundings(name, folder)
    _write(folder, stored_tensors(name))
    return folder


def _write(folder: Path, tensors: Tensors) -> None:
    """As the Hub's cache has a checkpoint: an index, and links to files of bounded size, which are called by a hash.

    So nobody reads them all for it, and it is of the header alone.
    """
    files: list[Tensors] = [{}]
    filled = 0
    for key, (dtype, shape) in tensors.items():
        size = math.prod(shape) * _SIZES[dtype]
        if filled + size > _PER_FILE and files[-1]:
            files.append({})
            filled = 0
        files[-1][key] = dtype, shape
        filled += size
    index: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        index |= dict.fromkeys(part, name)
        digest = hashlib.sha256(json.dumps(part).encode()).hexdigest()
        (folder / name).symlink_to(digest)
        hollow_file(folder / digest, part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), "utf-8")


def hollow_file(path: Path, tensors: Tensors) -> None:
    """A safetensors file of these dtypes and shapes that takes no room on the disk."""
    header, end = {}, 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * _SIZES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
