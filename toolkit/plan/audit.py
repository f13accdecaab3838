"""What a checkpoint is made of: every part's parameters and bytes, what becomes int8, what is adapted, what is left.

Read from the config and the safetensors headers alone, in a folder or on the Hub, so it costs no download of weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)
from torch import nn

from toolkit.architecture import LINEAR_ROLES, Architecture, describe, skeleton
from toolkit.errors import HubError, ModelError, first_line
from toolkit.plan.agreement import refuse_wrong_shapes
from toolkit.plan.formats import declared_format

__all__ = ["Audit", "Header", "Part", "audit", "check_shards", "parts_of"]

_INT8_ROLES = dict(zip(LINEAR_ROLES, ("attention", "shared experts", "dense layers"), strict=True))
_EXPERTS, _UNSEEN = "expert stacks", "expert stacks that text never reaches"
_MOST_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class Header:
    """What a safetensors header says of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Part:
    """One kind of tensor: how many, parameters, bytes as int8 (with scales) or 16 bit, and whether LoRA reaches it."""

    name: str
    tensors: int
    parameters: int
    stored: str
    bytes: int
    adapted: str


@dataclass(frozen=True)
class Audit:
    """All parts of a model, and what its checkpoint's headers say: bytes on disk, dtypes, elements."""

    model: str
    moe_layers: int
    experts: int
    parts: tuple[Part, ...]
    checkpoint_bytes: int
    checkpoint_dtypes: tuple[str, ...]
    checkpoint_parameters: int

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        """In memory: int8 with its scales, the rest in 16 bit."""
        return sum(part.bytes for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        sizes = {"parameters": self.parameters, "bytes": self.bytes, "bytes_fp32": 4 * self.parameters}
        return {**asdict(self), **sizes, "bytes_bf16": 2 * self.parameters}


def audit(name_or_path: str, *, revision: str = "main") -> Audit:
    """Take stock of a checkpoint without loading it.

    Raises:
        ModelError: not an MoE, an unknown family or format, no safetensors there, or a shard is missing or damaged.
        HubError: the Hub cannot be reached, or has no such model for this user.
    """
    if not Path(name_or_path).exists():
        _ask_hub(name_or_path, revision)
    model = skeleton(name_or_path, revision=revision)
    declared_format(name_or_path, model.config)
    architecture = describe(model)
    tensors = list(_headers(name_or_path, revision))
    refuse_wrong_shapes(name_or_path, model, ((tensor.name, tensor.shape) for tensor in tensors))
    return Audit(
        model=name_or_path,
        moe_layers=len(architecture.layers),
        experts=sum(layer.num_experts for layer in architecture.layers),
        parts=parts_of(model, architecture),
        checkpoint_bytes=sum(tensor.bytes for tensor in tensors),
        checkpoint_dtypes=tuple(sorted({tensor.dtype for tensor in tensors})),
        checkpoint_parameters=sum(math.prod(tensor.shape) for tensor in tensors),
    )


def parts_of(model: nn.Module, architecture: Architecture) -> tuple[Part, ...]:
    """Every parameter of `model` (meta is enough) in exactly one part."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    rows = {name: 2 if layer.is_transposed else 1 for layer in architecture.layers for name in layer.stacks}
    text, other = ([layer for layer in architecture.layers if layer.sees_text is sees] for sees in (True, False))
    groups = {_EXPERTS: [name for layer in text for name in layer.stacks]}
    groups[_UNSEEN] = [name for layer in other for name in layer.stacks]
    for role, title in _INT8_ROLES.items():
        groups[title] = [f"{name}.weight" for name in architecture.linear_names(role)]
    groups["routers"] = [f"{layer.router}.weight" for layer in text]
    taken = {name for names in groups.values() for name in names}
    groups["embeddings, head, norms and the rest"] = [name for name in shapes if name not in taken]
    return tuple(_part(title, names, shapes, rows) for title, names in groups.items() if names)


def _part(title: str, names: list[str], shapes: Mapping[str, tuple[int, ...]], rows: Mapping[str, int]) -> Part:
    parameters = sum(math.prod(shapes[name]) for name in names)
    adapted = "yes" if title in (_EXPERTS, "routers", "attention") else "no"
    if title in ("shared experts", "dense layers"):
        adapted = "with all-linear"
    if title not in (_EXPERTS, _UNSEEN, *_INT8_ROLES.values()):
        return Part(title, len(names), parameters, "16 bit", 2 * parameters, adapted)
    scales = sum(shapes[name][0] * shapes[name][rows[name]] if name in rows else shapes[name][0] for name in names)
    return Part(title, len(names), parameters, "int8", parameters + 4 * scales, adapted)


def _headers(name_or_path: str, revision: str) -> Iterable[Header]:
    """Of every tensor in the checkpoint."""
    if Path(name_or_path).is_dir():
        yield from check_shards(Path(name_or_path))
        return
    try:
        found = get_safetensors_metadata(name_or_path, revision=revision)
    except RemoteEntryNotFoundError as error:
        shard = error.response.url.path.rpartition("/")[2]
        raise ModelError(f"{name_or_path}: lacks the shard {shard}, which its index names") from None
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ModelError(f"{name_or_path}: no readable safetensors there: {first_line(error)}") from None
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise HubError(f"{name_or_path}: its safetensors headers cannot be read: {first_line(error)}") from None
    for metadata in found.files_metadata.values():
        for key, info in metadata.tensors.items():
            yield Header(key, info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])


def _ask_hub(name: str, revision: str) -> None:
    """Fetch config.json, for the Hub's own reasons where it does not give it; transformers has one for all of them."""
    try:
        hf_hub_download(name, "config.json", revision=revision)
    except GatedRepoError:
        raise HubError(f"{name}: gated; accept its terms on its page on the Hub, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise HubError(f"{name}: no such model on the Hub, or a private one; check the name, or set HF_TOKEN") from None
    except RemoteEntryNotFoundError:
        raise ModelError(f"{name}: no config.json there; give a transformers checkpoint") from None
    except LocalEntryNotFoundError as error:
        raise HubError(f"{name}: neither in the cache nor to be had from the Hub: {first_line(error)}") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise HubError(f"{name}: the Hub does not give it: {first_line(error)}") from None
    except ValueError:
        raise ModelError(f"{name}: no such folder, and not a Hub name (owner/name)") from None


def check_shards(folder: Path) -> list[Header]:
    """What the headers say of every tensor in a local checkpoint, after checking that its files are there and whole.

    Raises:
        ModelError: a shard is missing, cut short or not safetensors; or there is none at all.
    """
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of shards ({first_line(error)}); download it again") from None
    if missing := sorted({*map(str, listed)} - {file.name for file in files}):
        raise ModelError(f"{folder}: lacks the shard {missing[0]} ({len(missing)} missing); download it again")
    if not files:
        raise ModelError(f"{folder}: no .safetensors file in this folder; other formats are not read")
    return [entry for file in files for entry in _read_header(file)]


def _read_header(file: Path) -> list[Header]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_MOST_HEADER_BYTES, size):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        whole = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = [_header(name, entry) for name, entry in entries.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: not a safetensors file ({first_line(error)}); download it again") from None
    if whole != size:
        raise ModelError(f"{file}: damaged, {size} bytes where its header says {whole}; download it again")
    return found


def _header(name: str, entry: dict[str, Any]) -> Header:
    first, last = entry["data_offsets"]
    return Header(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), last - first)
