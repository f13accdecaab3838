"""Which files a checkpoint is made of: its shards by `model.safetensors.index.json`, and what lies beside them.

transformers reads the index while it loads and asks the Hub for what is missing; here a folder is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from toolkit.errors import ModelError, first_line

__all__ = ["BESIDE", "INDEX", "SINGLE", "beside", "listed", "shards_of", "write_index"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Patterns of what belongs to a checkpoint beside its weights: tokenizer, templates, configs, index and licence."""


def listed(folder: Path) -> list[str]:
    """The files that the index names, sorted; the single one where there is no index. They need not be there.

    Raises:
        ModelError: the index cannot be read, or leads out of the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return [SINGLE]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if wrong := [name for name in names if Path(name).name != name]:
            raise ValueError(f"it names {wrong[0]!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: not an index of shards ({first_line(error)}); download it again") from None
    return names


def shards_of(folder: Path, name: str | None = None) -> list[str]:
    """The files that transformers would read, all of them there; `name` is what errors call the folder.

    Raises:
        ModelError: one is missing, or the index is damaged.
    """
    names = listed(folder)
    if missing := [file for file in names if not (folder / file).is_file()]:
        raise ModelError(
            f"{name or folder}: lacks the weights file {missing[0]} ({len(missing)} missing); onecard reads whole "
            "safetensors checkpoints: download it again"
        )
    return names


def write_index(folder: Path, weight_map: Mapping[str, str], size: int) -> None:
    """The index of shards that were written: each tensor's file, and the bytes of all tensors."""
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def beside(folder: Path) -> list[Path]:
    """The files of `BESIDE`, sorted."""
    return sorted({path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()})
