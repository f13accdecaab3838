"""What is checked of an adapter's files before anything of PEFT opens them: they may come from strangers.

PEFT takes pickles where there is no safetensors file, asks the Hub where a file is missing, runs the regular
expressions of a configuration, and allocates what its ranks say. All of that is settled here on the files alone.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from toolkit.checkpoint.files import read_header
from toolkit.errors import ModelError, first_line

__all__ = ["CONFIG", "WEIGHTS", "check_adapter_files", "check_patterns", "read_adapter_config"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MOST_JSON_BYTES = 8 << 20
_MOST_HEADER_BYTES = 32 << 20
_PATTERNS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")
_NAME = re.compile(r"[\w.\-]*")
_QUANTIFIED_GROUP = re.compile(r"\)\s*[*+?{]")
_QUANTIFIER = re.compile(r"[*+{]")


def check_adapter_files(folder: Path) -> None:
    """Raise `ModelError` unless the folder holds a LoRA adapter in safetensors that is safe to open."""
    config = read_adapter_config(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder / CONFIG}: peft_type is {str(config.get('peft_type'))[:40]!r}, not 'LORA'")
    check_patterns(config, folder / CONFIG)
    most = _most_rows(folder / WEIGHTS)
    for rank in _ranks(config):
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
            raise ModelError(
                f"{folder / CONFIG}: rank {str(rank)[:20]} does not fit the tensors, which have {most} rows"
            )


def check_patterns(config: Mapping[str, Any], path: Path) -> None:
    """Raise `ModelError` where a name pattern could take for ever to match: few quantifiers, and none on a group."""
    for key in _PATTERNS:
        value = config.get(key)
        for pattern in (
            [value] if isinstance(value, str) else list(value or ()) if isinstance(value, (list, dict)) else ()
        ):
            if not isinstance(pattern, str) or _NAME.fullmatch(pattern):
                continue
            if len(pattern) > 1000 or _QUANTIFIED_GROUP.search(pattern) or len(_QUANTIFIER.findall(pattern)) > 2:
                raise ModelError(f"{path}: {key}: {pattern[:60]!r} is no pattern for module names; list the names")


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The object in an `adapter_config.json`, of which nothing is checked; raises `ModelError` where it is none."""
    _require_plain(path, _MOST_JSON_BYTES)
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: not valid JSON; copy or download the adapter again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds a {type(found).__name__}, not an object")
    return found


def _most_rows(path: Path) -> int:
    """The largest number of rows of an A in the file, whose header is read and nothing else."""
    _require_plain(path, None)
    header = read_header(path, "copy it again", _MOST_HEADER_BYTES)
    shapes = {name: tensor.shape for name, tensor in header.items() if "lora_" in name and tensor.shape}
    # An embedding's A lies the other way round.
    rows = [max(shape) if "embedding" in name else shape[0] for name, shape in shapes.items()]
    if not rows:
        raise ModelError(f"{path}: holds no LoRA tensor")
    return int(max(rows))


def _require_plain(path: Path, most: int | None) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; an adapter is {CONFIG} and {WEIGHTS}, pickles are not read") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {first_line(error)}") from None
    # A link is what the Hub's cache holds; what it leads to must still be a file.
    if not stat.S_ISREG(status.st_mode) and not (stat.S_ISLNK(status.st_mode) and path.is_file()):
        raise ModelError(f"{path}: not a plain file")
    if most is not None and path.stat().st_size > most:
        raise ModelError(f"{path}: {path.stat().st_size} bytes, more than any adapter's configuration has")


def _ranks(config: Mapping[str, Any]) -> Iterator[Any]:
    yield config.get("r")
    pattern = config.get("rank_pattern") or {}
    yield from pattern.values() if isinstance(pattern, dict) else [pattern]
