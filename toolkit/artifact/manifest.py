"""The artifact's manifest: which files belong to it, their hashes, and where the adapter came from.

The Hub's own cache notices a bad download, but nothing tells a copied folder from a changed one, or an adapter from
another base. Everything read here may come from a stranger: sizes, names and types are checked before use.
"""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolkit.adapters.untrusted import check_patterns
from toolkit.errors import ModelError
from toolkit.run_folder import RunFolder

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "CARD",
    "FILES",
    "FORMAT",
    "GENERATION_CONFIG",
    "MANIFEST",
    "MTP_HEAD",
    "PICTURES",
    "TEMPLATE",
    "TOKENIZER_FILES",
    "file_entry",
    "is_plain",
    "load_adapter_config",
    "read_json",
    "read_manifest",
    "write_json",
]

FORMAT = 1
MANIFEST = "manifest.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MTP_HEAD = "mtp_head.safetensors"
GENERATION_CONFIG = "generation_config.json"
CARD = "README.md"
TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE}
)
PICTURES = {
    "experts.png": "Tokens by layer and expert, on held-out examples, with the adapter",
    "loss.png": "Training and held-out loss by step",
}
# Beside manifest.json, an artifact holds these files and no others.
FILES = TOKENIZER_FILES | PICTURES.keys() | {ADAPTER_WEIGHTS, ADAPTER_CONFIG, CARD, GENERATION_CONFIG, MTP_HEAD}

_LARGEST = 1 << 20
_MOST_JSON_BYTES = 8 * 2**20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


class _File(_Part):
    sha256: Sha256
    size: Annotated[int, Field(ge=0)]


class _Base(_Part):
    name: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None
    weights_sha256: Sha256
    is_int8: bool = False


class _Chat(_Part):
    form: Literal["chat", "text"] = "chat"
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    chat_template_kwargs: dict[str, Any] | None = None
    date: str | None = None
    system_prompt: str | None = None


class _LookedAt(_Part):
    files: dict[str, Sha256] = {}
    strings: list[str] = []


class _NewTokens(_Part):
    ids: dict[str, Annotated[int, Field(ge=0)]]
    rows: Annotated[int, Field(ge=1)] | None = None


class _Manifest(_Part):
    format: Literal[1]
    files: dict[str, _File]
    base: _Base
    versions: dict[str, str]
    recipe: dict[str, Any]
    results: dict[str, Any]
    coverage: dict[str, Any]
    chat: _Chat | None = None
    looked_at: _LookedAt | None = None
    stacks: dict[str, Literal["int8", "int4"]] | None = None
    new_tokens: _NewTokens | None = None


class _AdapterConfig(_Part):
    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=_LARGEST)]
    lora_alpha: Annotated[float, Field(gt=0, le=_LARGEST)] | Annotated[int, Field(ge=1, le=_LARGEST)]
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, float | int] = {}
    use_rslora: bool = False
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: None = None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The validated `manifest.json` of an artifact: `format files base versions recipe results coverage`.

    Where they are known also `chat`, how the run's conversations were written (`write_artifact` has its keys), and
    `looked_at`, the files that came from the base or the chat template, and paths that the base's own files hold; and
    `stacks`, what each of the base's expert stacks was in, where a budget chose; and `new_tokens`, their `ids` by text,
    and the `rows` that the base's embedding is to be resized to where it has too few.

    Raises `ModelError` where it is missing, not ours, or names a file that no artifact holds.
    """
    path = Path(folder) / MANIFEST
    data = _read_json(path)
    if isinstance(data.get("format"), int) and data["format"] > FORMAT:
        raise ModelError(
            f"{path}: format {data['format']} is newer than this onecard knows ({FORMAT}): upgrade onecard"
        )
    _validate(_Manifest, data, path)
    strangers = sorted(set(data["files"]) - FILES)
    if strangers:
        raise ModelError(
            f"{path}: lists {strangers[0][:80]!r}, which is no file of an artifact: do not use this folder"
        )
    return data


def load_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The validated `adapter_config.json` of a LoRA adapter, ours or another's. Raises `ModelError`."""
    path = Path(folder) / ADAPTER_CONFIG
    data = _read_json(path)
    _validate(_AdapterConfig, data, path)
    check_patterns(data, path)
    return data


def file_entry(path: Path) -> dict[str, Any]:
    """`{sha256, size}` of a file; size in bytes."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def is_plain(path: Path) -> bool:
    """Whether it is a file of its own, or the Hub cache's link to one: `snapshots/COMMIT/NAME` to `blobs/HASH`."""
    if path.is_symlink():
        blobs = path.parent.parent.parent / "blobs"
        return path.parent.parent.name == "snapshots" and path.resolve().parent == blobs.resolve() and path.is_file()
    return stat.S_ISREG(path.lstat().st_mode)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint or export; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, data: Any) -> None:
    """Write JSON that is the same bytes for the same data: sorted keys, UTF-8, no NaN."""
    text = json.dumps(data, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
        if not is_plain(path):
            raise ModelError(f"{path}: not a plain file: an artifact holds no links or folders")
        if status.st_size > _MOST_JSON_BYTES:
            raise ModelError(
                f"{path}: {status.st_size} bytes, more than an artifact's JSON can have: do not use this folder"
            )
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        begun = RunFolder(path.parent).recipe.is_file()
        why = "is a run that is not finished; the same onecard train goes on" if begun else "is not a complete artifact"
        raise ModelError(f"{path}: missing: {path.parent} {why}") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: not valid JSON: copy or download the artifact again") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: holds a {type(data).__name__}, not an object: copy or download the artifact again")
    return data


def _validate(kind: type[BaseModel], data: dict[str, Any], path: Path) -> None:
    try:
        kind.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part)[:80] for part in problem["loc"])
        raise ModelError(
            f"{path}: {key}: {problem['msg'].splitlines()[0].lower()}: not an adapter onecard reads"
        ) from None
