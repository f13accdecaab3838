"""Where tensors lie in the files of a checkpoint, and bytes written over them; safetensors writes whole files only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

import torch

__all__ = ["overwrite", "places_of"]


def places_of(folder: Path) -> dict[str, tuple[Path, int]]:
    """By tensor name, its file and the offset at which its bytes begin."""
    places: dict[str, tuple[Path, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        places |= {k: (path, 8 + size + v["data_offsets"][0]) for k, v in header.items() if k != "__metadata__"}
    return places


def overwrite(file: BinaryIO, offset: int, tensor: torch.Tensor) -> None:
    """Write a tensor's bytes; its dtype and shape must be those of the one that is there."""
    file.seek(offset)
    file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
