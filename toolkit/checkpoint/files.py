"""A checkpoint's files: its shards, what their headers say, whether they are whole, and the format of the weights.

No weight is read. `safetensors.safe_open` says whether a header is valid, but not where a tensor's bytes lie, and of a
file that was cut short not by how much. transformers reads the index while it loads and asks the Hub for what is
missing, finds out formats one by one, and would keep the weights as they are; here a folder is taken as it is, and a
snapshot in the Hub's cache is found without huggingface_hub: a plan does not wait for its import.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from toolkit.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "BESIDE",
    "GGUF",
    "INDEX",
    "METHOD",
    "REQUIRES",
    "SINGLE",
    "SOURCES",
    "Header",
    "Placed",
    "beside",
    "cache_root",
    "declared_format",
    "gguf_at",
    "headers_in",
    "here",
    "listed",
    "raw_header",
    "read_header",
    "shards_of",
    "stored_headers",
    "whole_snapshot",
    "write_index",
]

_MOST_BYTES = 100 << 20
"""Of a header; safetensors reads none that is longer."""
_WRONG = (
    *(OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError),
    *(ArithmeticError, RecursionError),  # an endless number, brackets without end
)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Patterns of what belongs to a checkpoint beside its weights: tokenizer, templates, configs, index and licence."""

METHOD = "onecard_int8"
"""`quantization_config.quant_method` of our int8 checkpoints."""

GGUF = "gguf"
"""`quantization_config.quant_method` of what is read from a GGUF file, which has no such config itself."""

REQUIRES = "onecard's int8 weights; call toolkit.register() before from_pretrained"
"""Stands as `transformers_weights` in the config.json of an int8 checkpoint.

transformers only warns of a format that it does not know and would take the integers for weights. What names no file
there it refuses, and quotes it.
"""

SOURCES = (
    *("fp8", "mxfp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "gptq", "awq", "auto-round", "intel/auto-round"),
    *("bitsandbytes", "modelopt", "quark", "mlx", "metal", "hqq", "torchao", GGUF),
)
"""Formats of others that are read: each weight is multiplied out and rounded to int8 at once."""
_BESIDE_CONFIG = "hf_quant_config.json"
"""Where modelopt says what it did, if not in config.json."""
_OF_QUANTO = "quanto_qmap.json"
"""What optimum-quanto writes of the types of weights; its config.json says nothing."""


@dataclass(frozen=True)
class Header:
    """What a header says of one tensor; `dtype` as safetensors calls it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Placed(Header):
    """Of a tensor in a file that is here: its bytes begin at `offset` of `path`."""

    path: Path
    offset: int


def raw_header(path: Path, most: int = _MOST_BYTES) -> bytes:
    """The JSON that a file begins with, as it stands there and at most `most` bytes of it; nothing is checked."""
    with path.open("rb") as stream:
        return stream.read(min(int.from_bytes(stream.read(8), "little"), most))


def read_header(path: Path, advice: str = "download it again", most: int = _MOST_BYTES) -> dict[str, Placed]:
    """The tensors of a file by name, in the header's order. Made for files of strangers too.

    Args:
        advice: what to do about a file that is wrong, for the error. most: bytes that its header may have.

    Raises:
        ModelError: not a safetensors file, one cut short, or one whose header safetensors itself refuses.
    """
    try:
        size, text = path.stat().st_size, raw_header(path, most + 1)
        if len(text) > most:
            raise ValueError(f"its header is longer than {most} bytes")
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {name: _placed(name, entry, path, 8 + len(text)) for name, entry in header.items()}
        whole = max((tensor.offset + tensor.bytes for tensor in found.values()), default=8 + len(text))
        if whole == size:
            with safe_open(path, framework="np"):
                return found
    except _WRONG as error:
        raise ModelError(f"{path}: not a safetensors file ({first_line(error)[:120]}); {advice}") from None
    raise ModelError(f"{path}: damaged, {size} bytes where its header says {whole}; {advice}")


def headers_in(folder: Path, advice: str = "download it again") -> dict[str, Placed]:
    """The tensors of every safetensors file of a folder, by name.

    Raises:
        ModelError: as `read_header`.
    """
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in read_header(path, advice).items()
    }


def _placed(name: str, entry: dict[str, Any], path: Path, begin: int) -> Placed:
    first, last = entry["data_offsets"]
    return Placed(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), last - first, path, begin + first)


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


def declared_format(name_or_path: str, config: PretrainedConfig) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint, with its `quant_method`; None where its weights are plain floats.

    Raises:
        ModelError: a format that can be neither loaded nor requantised.
    """
    parts = (config, config.get_text_config())
    declared = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    declared = declared or next((found for part in parts if (found := getattr(part, "quantization", None))), None)
    if declared is None:
        if (folder := _folder(name_or_path, config)) is None:
            return None
        if (folder / _OF_QUANTO).is_file():
            raise _unread(name_or_path, "quanto")
        if (told := _beside_config(folder)) is not None:
            return {**told, "quant_method": "modelopt"}
        return {"quant_method": "mlx"} if _is_of_mlx(folder) else None  # whose floats have names of their own
    declared = dict(declared) if isinstance(declared, Mapping) else {}
    if "quant_method" not in declared and {"bits", "group_size"} <= declared.keys():
        declared["quant_method"] = "mlx"  # which names itself nowhere
    method = declared.get("quant_method")
    if method == GGUF and gguf_at(name_or_path) is None:  # as GPTQModel writes them
        raise ModelError(
            f"{name_or_path}: has blocks of GGUF in safetensors, which is not read; take the unquantised checkpoint"
        )
    if method not in (METHOD, *SOURCES):
        raise _unread(name_or_path, method or "something without a quant_method")
    return declared


def _unread(name: str, method: Any) -> ModelError:
    said = f"its weights are quantised as {method}; read are {', '.join(SOURCES)}"
    return ModelError(f"{name}: {said}; take the unquantised checkpoint of this model")


def _folder(name_or_path: str, config: PretrainedConfig) -> Path | None:
    """Where a checkpoint is on this machine, None where it is not."""
    if (folder := Path(name_or_path)).is_dir():
        return folder
    commit = getattr(config, "_commit_hash", None)
    return whole_snapshot(name_or_path, commit) if commit else None


def _beside_config(folder: Path) -> dict[str, Any] | None:
    path = folder / _BESIDE_CONFIG
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON that says how weights are stored ({first_line(error)[:120]})") from None


def _is_of_mlx(folder: Path) -> bool:
    """Whether mlx-lm wrote a folder's weights: it says so in the header of each file, and of floats nowhere else."""
    try:
        path = next(folder.glob("*.safetensors"), None)
        told = json.loads(raw_header(path)).get("__metadata__") if path else None
    except _WRONG:  # whoever reads the file says what is wrong with it
        return False
    return isinstance(told, Mapping) and told.get("format") == "mlx"


def gguf_at(name_or_path: str | Path) -> Path | None:
    """What a name of a GGUF model leads to: the file, or a folder with GGUF files and no safetensors. None for others.

    Raises:
        ModelError: a name that ends in .gguf, and no such file.
    """
    path = Path(name_or_path)
    if path.suffix == ".gguf" and not path.is_dir():
        if path.is_file():
            return path
        raise ModelError(
            f"{name_or_path}: no such file; a GGUF file of the Hub is not fetched: download it, and give its path"
        )
    return path if any(path.glob("*.gguf")) and not any(path.glob("*.safetensors")) else None


def here(name_or_path: str, revision: str = "main") -> Path | None:
    """A checkpoint on this machine: a folder, a GGUF file, or a whole snapshot in the Hub's cache."""
    is_local = gguf_at(name_or_path) or Path(name_or_path).is_dir()
    return Path(name_or_path) if is_local else whole_snapshot(name_or_path, revision)


def stored_headers(name_or_path: str | Path, revision: str = "main") -> Sequence[Header]:
    """Of every tensor in the checkpoint; of one on the Hub nothing but the headers is fetched.

    Raises:
        ModelError: no safetensors there, or a shard is missing or damaged. HubError: the Hub does not give them.
    """
    folder = Path(name_or_path)
    if gguf_at(folder):
        from toolkit.checkpoint.gguf_source import opened

        tensors = opened(folder).file.tensors.values()
        return [Header(tensor.name, tensor.kind, tensor.shape, tensor.bytes) for tensor in tensors]
    if folder.is_dir():
        return _check_shards(folder)
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
        return folder if _check_shards(folder) else None
    except ModelError:  # not downloaded yet, or not to the end
        return None


def _check_shards(folder: Path) -> list[Placed]:
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


def cache_root() -> Path:
    """`$ONECARD_CACHE`, or `onecard` in the user's cache folder."""
    given = os.environ.get("ONECARD_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "onecard"
