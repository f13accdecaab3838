"""A GGUF file in the place of a checkpoint folder: its config, weights, files and tokenizer, opened once.

Everything that loads, counts, hashes or exports asks here where a folder would have answered with files.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from toolkit.checkpoint.config import read_generation_config
from toolkit.checkpoint.files import GGUF
from toolkit.checkpoint.formats.gguf import GgufCheckpoint, read_gguf
from toolkit.checkpoint.formats.gguf_tokenizer import load_tokenizer, tokenizer_place
from toolkit.checkpoint.weights import PackedSlice
from toolkit.errors import ModelError

__all__ = [
    "config_of",
    "gguf_files",
    "gguf_weights",
    "opened",
    "put_beside",
    "require_tokenizer",
    "templates_of",
    "tokenizer_of",
]


def opened(path: str | Path) -> GgufCheckpoint:
    """The checkpoint at `path`, as `gguf_at` gave it; its headers are read again only where a file has changed.

    Raises:
        ModelError, RecipeError: as `read_gguf`.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    read = [file for file in (*sorted(folder.glob("*.gguf")), folder / "config.json") if file.is_file()]
    return _opened(Path(path), *((file.absolute(), file.stat().st_size, file.stat().st_mtime_ns) for file in read))


@lru_cache(maxsize=4)
def _opened(path: Path, *status: tuple[Path, int, int]) -> GgufCheckpoint:
    return read_gguf(path)


def gguf_files(path: str | Path) -> tuple[Path, ...]:
    """The file, or all parts of a split one, in order. Raises as `opened`."""
    return opened(path).file.files


def config_of(path: str | Path) -> PretrainedConfig:
    """A copy of the config, with a quantization_config that says what it was read from."""
    config = copy.deepcopy(opened(path).config)
    config.quantization_config = {"quant_method": GGUF}
    return config


def gguf_weights(path: str | Path) -> dict[str, PackedSlice]:
    """Every weight by the model's own name, unread."""
    found = opened(path)
    slices = found.slices
    return {name: PackedSlice(packed, slices) for name, packed in found.weights.items()}


def tokenizer_of(path: str | Path) -> Any:
    """The tokenizer. Raises `ModelError` where it must be given."""
    return load_tokenizer(opened(path).file)


def put_beside(path: str | Path, folder: Path) -> None:
    """Write into a checkpoint's folder what a GGUF file has beside weights: its tokenizer, where it can be had, and the
    generation_config.json that lies beside it."""
    with suppress(ModelError):
        tokenizer_of(path).save_pretrained(folder)
    if (said := read_generation_config(str(path))) is not None:
        said.save_pretrained(folder)


def templates_of(path: str | Path) -> list[str]:
    """The chat templates inside the file."""
    metadata = opened(path).file.metadata.items()
    return [str(value) for key, value in metadata if key.startswith("tokenizer.chat_template")]


def require_tokenizer(path: str | Path) -> None:
    """Raise `ModelError` where the headers say already that the tokenizer must be given; none is built."""
    place = tokenizer_place(opened(path).file)
    if place.startswith("elsewhere"):
        raise ModelError(f"{path}: its tokenizer must come from {place}; set model.tokenizer_name_or_path")
