"""Which base an adapter belongs to: name, commit and a hash of the weights, never a path of this machine.

An adapter on the wrong base loads without a word and answers nonsense. PEFT records only the name it was given (often a
local path); huggingface_hub knows commits, not what a local folder holds. This module joins both into one value.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from yaml import YAMLError  # type: ignore[import-untyped]

from toolkit.checkpoint.files import METHOD, gguf_at, shards_of
from toolkit.errors import ModelError
from toolkit.steps import advance, part

__all__ = [
    "BaseIdentity",
    "cached_snapshot",
    "config_sha256",
    "files_of",
    "identify_base",
    "license_of",
    "weight_files",
]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAYS_NOTHING = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "transformers_weights"}
)
"""Of a config.json: where it came from, and how its files are stored; the run's own dtype is bound apart."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READERS = 8
"""Shards that are hashed at once: a core hashes one to two GB a second, less than a fast disk reads."""


@dataclass(frozen=True)
class BaseIdentity:
    """A base checkpoint: `name` is a Hub repository or the last part of a local folder, never a path.

    `revision` is the 40-hex commit, or None for a local folder. `weights_sha256` is the SHA-256 over the lines
    `<shard name> <SHA-256 of the shard>`, sorted by name: equal files give equal hashes wherever they lie, and a
    checkpoint that was sharded differently counts as another base. `is_int8` says that the checkpoint is one of ours,
    whose integers say nothing of the weights that they were rounded from.
    """

    name: str
    revision: str | None
    weights_sha256: str
    is_int8: bool = False


def identify_base(name_or_path: str, revision: str = "main") -> BaseIdentity:
    """The identity of a checkpoint that is a local folder or already lies in the Hub cache. Never downloads.

    Reads every shard once (disk speed), except in the Hub cache, where a large file is stored under its own SHA-256.
    Of a GGUF file, or the parts of one, it is the same with their names, and `name` is that of the first.
    Raises `ModelError` where the checkpoint is not here or has no safetensors weights.
    """
    folder = Path(name_or_path)
    if path := gguf_at(name_or_path):
        return BaseIdentity(weight_files(path)[0].name, None, _weights_sha256(path))
    if folder.is_dir():
        name, commit = _hub_origin(folder) or (folder.resolve().name, None)
    else:
        folder = cached_snapshot(name_or_path, revision)
        name, commit = name_or_path, folder.name
    return BaseIdentity(name, commit, _weights_sha256(folder), _is_int8(folder))


def _is_int8(folder: Path) -> bool:
    try:
        declared = json.loads((folder / "config.json").read_bytes()).get("quantization_config")
        return isinstance(declared, dict) and declared.get("quant_method") == METHOD
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def config_sha256(name_or_path: str, revision: str = "main") -> str:
    """A hash of what `config.json` says of the computation: equal weights under another one are another base.

    What a GGUF file says of it is among its weights. Raises `ModelError` where there is none that can be read.
    """
    folder = Path(name_or_path)
    if found := gguf_at(name_or_path):
        folder = files_of(str(found)) or folder
        if not (folder / "config.json").is_file():
            return hashlib.sha256(b"{}").hexdigest()
    path = (folder if folder.is_dir() else cached_snapshot(name_or_path, revision)) / "config.json"
    try:
        config = json.loads(path.read_bytes())
        said = {key: value for key, value in config.items() if key not in _SAYS_NOTHING}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise ModelError(f"{path}: cannot be read as JSON: download the checkpoint again") from None
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _hub_origin(folder: Path) -> tuple[str, str] | None:
    """Repository and commit of a folder inside the Hub cache: `models--owner--name/snapshots/<commit>`."""
    folder = folder.absolute()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--") and _COMMIT.fullmatch(folder.name):
        return repository.removeprefix("models--").replace("--", "/"), folder.name
    return None


def license_of(name_or_path: str, revision: str = "main") -> str | None:
    """The Hub id of a checkpoint's licence, from the card or the GGUF file that is here, or None. Never downloads."""
    if path := gguf_at(name_or_path):
        from toolkit.checkpoint.gguf_source import opened

        stated = opened(path).file.metadata.get("general.license")
        return stated if isinstance(stated, str) else None
    card: Any = Path(name_or_path) / "README.md"
    if not Path(name_or_path).is_dir():
        card = try_to_load_from_cache(name_or_path, "README.md", revision=revision)
    try:
        found = (metadata_load(card) or {}).get("license") if isinstance(card, (str, Path)) else None
    except (OSError, ValueError, YAMLError):
        return None
    return found if isinstance(found, str) else None


def cached_snapshot(repo_id: str, revision: str) -> Path:
    """The folder of a repository in the Hub's cache. Never downloads; raises `ModelError` where it is not there."""
    try:
        config = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    except HFValidationError:
        config = None
    if not isinstance(config, str):
        raise ModelError(
            f"{repo_id}@{revision}: neither a folder nor in the Hub cache: load the base once, or give its folder"
        )
    return Path(config).parent


def files_of(name_or_path: str, revision: str = "main") -> Path | None:
    """The folder of a checkpoint: itself, its copy in the Hub's cache, or that of its GGUF file; None where none is.

    A GGUF file without a config.json beside it stands for itself: what else lies there is not the model's.
    """
    if path := gguf_at(name_or_path):
        return path.parent if path.is_file() and (path.parent / "config.json").is_file() else path
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        return cached_snapshot(name_or_path, revision)
    except ModelError:
        return None


def weight_files(place: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, at the folder or GGUF file that `fetch` gives.

    Raises:
        ModelError: one is missing, or the index is damaged.
    """
    if gguf_at(place):
        from toolkit.checkpoint.gguf_source import gguf_files

        return list(gguf_files(place))
    return [place / name for name in shards_of(place)]


def _weights_sha256(place: Path) -> str:
    digest, files = hashlib.sha256(), weight_files(place)
    pool = ThreadPoolExecutor(min(_READERS, len(files)), "onecard-hash")
    try:
        with part("hash the base"):
            for number, (file, found) in enumerate(zip(files, pool.map(_file_sha256, files), strict=True), 1):
                digest.update(f"{file.name} {found}\n".encode())
                advance(number, len(files), "files")
    finally:
        pool.shutdown(cancel_futures=True)  # who interrupts waits for the shards that are being read, and no others
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    stored_as = path.resolve().name
    if path.is_symlink() and _SHA256.fullmatch(stored_as):
        return stored_as
    status = path.stat()
    return _content_sha256(path.absolute(), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _content_sha256(path: Path, *status: int) -> str:
    """A run asks for its base several times; a large file is read again only where its size or times have changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
