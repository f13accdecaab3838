"""Checkpoints that are whole or not there: written aside, synced, hashed, renamed, read back; then older ones go.

transformers writes straight into `checkpoint-N`, takes the highest N unchecked on resume, and keeps optimizer and
random numbers as pickles, which run code when they are opened and whose damage shows late or never. Here a folder
counts only if its manifest vouches for every byte of every file in it, the manifest's own included, and order is by
step, never by a clock. Nested state becomes JSON and tensors, and is the same again, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from toolkit.durable import staged_folder, sync
from toolkit.errors import ModelError, ResourceError, first_line

__all__ = [
    "Checkpoint",
    "Resume",
    "clear_leftovers",
    "every_checkpoint",
    "flatten",
    "newest_checkpoint",
    "open_checkpoint",
    "random_state",
    "read_json",
    "read_tensors",
    "restore_random_state",
    "rotate",
    "sealed",
    "unflatten",
    "write_checkpoint",
]

FORMAT = 1
MANIFEST = "manifest.json"
FEWEST = 2
"""Valid checkpoints kept whatever the recipe's limit: the newest may be damaged by what damages the machine."""

_NAME = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")
_FILE = re.compile(r"[\w-][\w.-]{0,99}")
_LEFTOVER = re.compile(r"\.checkpoint-\d+\.(partial|old|discarded)")
_MOST_MANIFEST_BYTES = 8 << 20

_TENSOR, _ARRAY, _TUPLE, _ITEMS = "$tensor", "$array", "$tuple", "$items"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte was found as it was written; `facts` are what its writer recorded."""

    path: Path
    step: int
    facts: dict[str, Any]


@dataclass
class Resume:
    """What a run is bound to, written into its checkpoints, and the checkpoint it goes on from, if there is one."""

    facts: dict[str, Any]
    checkpoint: Checkpoint | None = None


def write_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    texts: Mapping[str, str],
    facts: Mapping[str, Any],
) -> Checkpoint:
    """Write `folder/checkpoint-<step>`, make it durable, and read it back; a damaged one of that step is replaced.

    Args:
        tensors: safetensors files by name. texts: UTF-8 files by name. facts: JSON kept in the manifest.

    Raises:
        ResourceError: it cannot be written or does not read back; older checkpoints are untouched.
    """
    target = folder / f"checkpoint-{step}"
    try:
        with staged_folder(target, replace=True) as staging:
            for name, content in tensors.items():
                save_file(dict(content), staging / name)
            for name, text in texts.items():
                (staging / name).write_text(text, encoding="utf-8")
            files = {path.name: _entry(path) for path in sorted(staging.iterdir())}
            manifest = {"format": FORMAT, "step": step, "files": files, "facts": dict(facts)}
            (staging / MANIFEST).write_text(sealed(manifest), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ResourceError(
            f"{target}: cannot be written: {reason}; older checkpoints are intact: free space or fix the disk, then "
            "rerun the same command"
        ) from None
    try:
        return open_checkpoint(target)
    except ModelError as error:
        raise ResourceError(f"{error}; it was just written, so check the disk; older checkpoints are intact") from None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every byte checked; nothing in it is executed.

    Raises:
        ModelError: a file is missing, no plain file, or not the bytes that were written; it names the file.
    """
    manifest = _read_manifest(path)
    if path.name != f"checkpoint-{manifest['step']}":
        raise ModelError(f"{path}: holds step {manifest['step']}: it was renamed")
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            if not stat.S_ISREG(file.lstat().st_mode):
                raise ModelError(f"{file}: not a plain file")
            if file.stat().st_size != entry["size"]:
                raise ModelError(f"{file}: {file.stat().st_size} bytes, not {entry['size']}")
            if _entry(file) != entry:
                raise ModelError(f"{file}: changed after it was written (SHA-256 differs)")
        except FileNotFoundError:
            raise ModelError(f"{file}: missing") from None
        except OSError as error:
            raise ModelError(f"{file}: cannot be read ({error.strerror})") from None
    return Checkpoint(path, manifest["step"], manifest["facts"])


def every_checkpoint(folder: Path) -> Iterator[Path]:
    """Folders named like a checkpoint, highest step first, unchecked."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    yield from sorted(found, key=_step, reverse=True)


def newest_checkpoint(folder: Path, skipped: Callable[[str], None] = lambda reason: None) -> Checkpoint | None:
    """The valid checkpoint with the highest step; `skipped` is told why each higher one is not taken."""
    for path in every_checkpoint(folder):
        try:
            return open_checkpoint(path)
        except ModelError as error:
            skipped(str(error))
    return None


def rotate(folder: Path, limit: int, trusted: set[str]) -> None:
    """Remove all but the newest valid checkpoints, at least two, and the newest of the best held-out loss.

    Args:
        limit: how many are kept. trusted: names found valid by this process, so that they are not read again; grows.
    """
    kept: list[Checkpoint] = []
    for path in every_checkpoint(folder):
        try:
            kept.append(_known(path) if path.name in trusted else open_checkpoint(path))
            trusted.add(path.name)
        except ModelError:
            continue  # a damaged one is no reason to keep fewer that are whole
    losses = [(each.facts["eval_loss"], -each.step) for each in kept if each.facts.get("eval_loss") is not None]
    stay = {each.step for each in kept[: max(limit, FEWEST)]} | ({-min(losses)[1]} if losses else set())
    if len(kept) >= FEWEST:
        for path in every_checkpoint(folder):
            if _step(path) not in stay:
                trusted.discard(path.name)
                _discard(path)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed save or rotation left behind; it never counted as a checkpoint."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a checked file, in memory of their own: aligned as torch aligns them, and safe from a rotation."""
    return {name: tensor.clone() for name, tensor in load(path.read_bytes()).items()}


def read_json(path: Path) -> Any:
    """The JSON of a checked file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _known(path: Path) -> Checkpoint:
    return Checkpoint(path, _step(path), _read_manifest(path)["facts"])


def _discard(path: Path) -> None:
    """Out of sight in one step, so that a kill leaves no half of a checkpoint under its name."""
    aside = path.with_name(f".{path.name}.discarded")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        sync(path.parent)
        shutil.rmtree(aside)
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be removed ({error.strerror}); the newest checkpoint is intact: rerun the same command"
        ) from None


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def sealed(manifest: Mapping[str, Any]) -> str:
    """The manifest as text with a hash over itself: there is one text for each content, so any changed byte shows."""
    body = json.dumps(manifest, sort_keys=True, indent=1)
    return json.dumps({**manifest, "seal": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True, indent=1) + "\n"


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        if not stat.S_ISREG(file.lstat().st_mode) or file.stat().st_size > _MOST_MANIFEST_BYTES:
            raise ModelError(f"{file}: not a checkpoint's manifest")
        text = file.read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        whole = text == sealed({key: value for key, value in found.items() if key != "seal"})
    except FileNotFoundError:
        raise ModelError(f"{path}: no {MANIFEST}: cut off, or not written by onecard") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, AttributeError, RecursionError):
        raise ModelError(f"{file}: damaged") from None
    if not whole:
        raise ModelError(f"{file}: damaged")
    if found.get("format") != FORMAT:
        raise ModelError(f"{file}: format {str(found.get('format'))[:20]} is not this version's {FORMAT}")
    if not _is_manifest(found):
        raise ModelError(f"{file}: sealed, but not as onecard writes it")
    return found


def _is_manifest(found: Mapping[str, Any]) -> bool:
    """Whether the parts are there and of their types; a seal is a sum and no signature, so anyone can make one."""
    step, files, facts = found.get("step"), found.get("files"), found.get("facts")
    return (
        type(step) is int
        and isinstance(facts, dict)
        and isinstance(files, dict)
        and all(_FILE.fullmatch(name) and isinstance(entry, dict) for name, entry in files.items())
        and all(entry.keys() == {"sha256", "size"} for entry in files.values())
    )


def flatten(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """`value` as something JSON can hold; its tensors go into `tensors`, copied to the CPU, under names below `name`.

    Dictionaries with any keys, lists, tuples, NumPy arrays, numbers, strings and None are kept. Raises `TypeError` for
    anything else.
    """
    match value:
        case torch.Tensor():
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {_TENSOR: name}
        case np.ndarray():
            return {_ARRAY: str(value.dtype), "values": value.tolist()}
        case np.generic():
            return value.item()
        case dict() if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: flatten(item, tensors, f"{name}.{key}") for key, item in value.items()}
        case dict():
            return {_ITEMS: [[key, flatten(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
        case tuple():
            return {_TUPLE: [flatten(item, tensors, f"{name}.{n}") for n, item in enumerate(value)]}
        case list():
            return [flatten(item, tensors, f"{name}.{n}") for n, item in enumerate(value)]
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be kept in a checkpoint")


def unflatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What `flatten` was given. Raises `KeyError` where a tensor is missing."""
    match value:
        case {"$tensor": str(name)}:
            return tensors[name]
        case {"$array": str(dtype), "values": list(values)}:
            return np.array(values, dtype=dtype)
        case {"$tuple": list(items)}:
            return tuple(unflatten(item, tensors) for item in items)
        case {"$items": list(pairs)}:
            return {key: unflatten(item, tensors) for key, item in pairs}
        case dict():
            return {key: unflatten(item, tensors) for key, item in value.items()}
        case list():
            return [unflatten(item, tensors) for item in value]
    return value


def random_state() -> dict[str, Any]:
    """The state of every random number generator that training draws from: Python, NumPy, torch, each card."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.random.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on drawing where `random_state` was taken."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.random.set_rng_state_all(state["cuda"])
