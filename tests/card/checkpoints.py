"""A published model's checkpoint at its real size, as files that are nothing but a header and a hole."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.harness.published import published_tensors, write_surroundings

__all__ = ["hollow_checkpoint"]

_PER_FILE = 5 << 30


def hollow_checkpoint(name: str, folder: Path) -> Path:
    """Write the checkpoint of one of `toolkit.plan.shapes.published`, in bf16 and by the names that its files have."""
    folder.mkdir(parents=True, exist_ok=True)
    write_surroundings(name, folder)
    _write(folder, published_tensors(name))
    return folder


def _write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """As safetensors writes a checkpoint: an index, and files of bounded size."""
    size = torch.bfloat16.itemsize
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for key, shape in shapes.items():
        count = torch.Size(shape).numel() * size
        if filled + count > _PER_FILE and files[-1]:
            files.append({})
            filled = 0
        files[-1][key] = shape
        filled += count
    index: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        header, end = {}, 0
        for key, shape in part.items():
            start, end = end, end + torch.Size(shape).numel() * size
            header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
            index[key] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), "utf-8")
