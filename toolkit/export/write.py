"""Exports: the same adapter in other programs' layouts, each read back and compared before it is called done.

Nothing is converted on trust: a folder gets its name only after its tensors, read from the disk, have given the
adapter's own numbers again, and `export.json` records how near.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from toolkit.adapters.layouts import Factors, from_per_expert, largest_difference, per_expert, read_factors
from toolkit.architecture import describe
from toolkit.artifact.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TEMPLATE,
    file_entry,
    load_adapter_config,
    read_manifest,
    write_json,
)
from toolkit.artifact.tokenizer import declare_stops, put_stops, put_tokenizer, read_stops, token_text
from toolkit.artifact.verify import require_base, verify_artifact
from toolkit.checkpoint.config import skeleton as skeleton_of
from toolkit.checkpoint.files import METHOD, gguf_at, read_header
from toolkit.checkpoint.identity import files_of
from toolkit.durable import staged_folder
from toolkit.errors import ModelError, RecipeError, ResourceError, first_line
from toolkit.export.gguf import modelfile, read_gguf, write_gguf
from toolkit.export.merge import DRAFT_FOLDER, merge_checkpoint, merged_difference, stitch_head
from toolkit.export.server_rules import server_problems
from toolkit.steps import part

__all__ = ["FORMATS", "Export", "export_adapter"]

FORMATS = ("peft", "per-expert", "merged", "merged-int8", "gguf")
_RECORD = "export.json"
_FP32_SUMS = 1e-5
"""Folding a scaling into B and padding ranks reorders fp32 sums; this is far above that and far below any adapter."""


@dataclass(frozen=True)
class Export:
    """What was written, what it was compared with, how far off it is, and the bound it was held to."""

    folder: str
    format: str
    compared: str
    difference: float
    bound: float
    servers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What stands against each server that reads this layout, by its own rules; empty lists where nothing does."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@part("export")
def export_adapter(artifact: str | Path, base: str | Path, format: str, out: str | Path) -> Export:
    """Write an artifact in another layout to the new folder `out`.

    Tokenizer, chat template and what ends an answer go along from the artifact, never from the base.

    Args:
        base: folder of the original checkpoint, or its GGUF file.
        format: one of `FORMATS`.

    Raises:
        RecipeError: no such format, or `out` exists. ResourceError: the disk is full or broken.
        ModelError: the family cannot have this layout, or what was written does not give the adapter's numbers, tokens
            or end tokens; nothing is left behind then.
    """
    artifact, base, out = Path(artifact), Path(base), Path(out)
    if format not in FORMATS:
        raise RecipeError(f"--format {format}: no such layout; known: {', '.join(FORMATS)}")
    if out.exists():
        raise RecipeError(f"{out}: already exists; give another name")
    verify_artifact(artifact, strict=True)
    require_base(artifact, str(base))
    skeleton = skeleton_of(str(base))
    adapter = read_factors(artifact, skeleton)
    try:
        with staged_folder(out) as folder:
            compared, difference, bound = _WRITERS[format](artifact, base, adapter, skeleton, folder)
            if not difference <= bound:
                raise ModelError(
                    f"{format}: what was written is off by {difference:.2e}, over {bound:.0e}: not exported"
                )
            servers = _servers(folder, skeleton) if format == "per-expert" else {}
            export = Export(str(out), format, compared, difference, bound, servers)
            _record(export, artifact, folder, out.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ResourceError(f"{out}: cannot be exported: {reason}; free space or give another folder") from None
    return export


def _record(export: Export, artifact: Path, folder: Path, name: str) -> None:
    """What was written, and of the artifact's manifest the base and how conversations are written."""
    files = {str(path.relative_to(folder)): file_entry(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = read_manifest(artifact)
    told = {key: manifest[key] for key in ("base", "chat") if manifest.get(key)}
    write_json(folder / _RECORD, {**export.to_dict(), **told, "folder": name, "files": files})


def _servers(folder: Path, skeleton: PreTrainedModel) -> dict[str, list[str]]:
    shapes = {key: tensor.shape for key, tensor in read_header(folder / ADAPTER_WEIGHTS).items()}
    experts = max(layer.num_experts for layer in describe(skeleton).layers)
    return server_problems(shapes, load_adapter_config(folder), experts)


def _peft(artifact: Path, base: Path, adapter: list[Factors], skeleton: PreTrainedModel, folder: Path) -> Any:
    for path in artifact.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    return "updates, over the largest", largest_difference(adapter, read_factors(folder, skeleton)), 0.0


def _per_expert(artifact: Path, base: Path, adapter: list[Factors], skeleton: PreTrainedModel, folder: Path) -> Any:
    tensors, rank = per_expert(adapter, skeleton)
    save_file({name: tensors[name] for name in sorted(tensors)}, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    leaves = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors})
    write_json(folder / ADAPTER_CONFIG, _plain_config(load_adapter_config(artifact), rank, leaves))
    put_tokenizer(artifact, folder)
    put_stops(artifact, folder)
    back = from_per_expert(load_file(folder / ADAPTER_WEIGHTS), adapter, skeleton)
    return "updates, over the largest", largest_difference(adapter, back), _FP32_SUMS


def _plain_config(config: dict[str, Any], rank: int, leaves: list[str]) -> dict[str, Any]:
    """One rank, alpha the same: servers read no patterns."""
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return {**config, **plain, "target_modules": leaves, "target_parameters": None}


def _merged(artifact: Path, base: Path, adapter: list[Factors], skeleton: PreTrainedModel, folder: Path) -> Any:
    merge_checkpoint(base, adapter, skeleton, folder)
    put_tokenizer(artifact, folder)
    put_stops(artifact, folder)
    head = stitch_head(artifact, skeleton, folder)
    for checkpoint in (folder, folder / DRAFT_FOLDER):
        declare_stops(checkpoint, read_stops(artifact), files_of(str(base)) or base)
    _, steps = merged_difference(base, folder, adapter)
    source = " from the dequantised GGUF" if gguf_at(base) else ""
    told = f"merged weights{source}, in roundings of the checkpoint's dtype; multi-token-prediction head: {head}"
    return told, steps, 1.01


def _merged_int8(artifact: Path, base: Path, adapter: list[Factors], skeleton: PreTrainedModel, folder: Path) -> Any:
    from toolkit.quant.save import quantize_checkpoint

    merged, result = folder / "merged", folder / "int8"
    merged.mkdir()
    _, steps, bound = _merged(artifact, base, adapter, skeleton, merged)
    quantize_checkpoint(str(merged), result)
    if steps > bound:
        raise ModelError(f"merged-int8: the merge is off by {steps:.2f} roundings: not exported")
    off = _int8_steps(merged, result, adapter)
    put_tokenizer(artifact, result)
    put_stops(artifact, result)
    for path in [*result.iterdir(), *merged.glob(DRAFT_FOLDER)]:
        path.rename(folder / path.name)
    result.rmdir()
    shutil.rmtree(merged)
    return "merged weights, in int8 steps", off, 0.51


def _int8_steps(merged: Path, int8: Path, adapter: list[Factors]) -> float:
    """Largest difference of integers times scale from the merged weights, in steps of the scale."""
    from toolkit.checkpoint.conversion import Shards
    from toolkit.quant.source import SourceWeights

    source, worst = SourceWeights(str(merged)), 0.0
    with Shards(str(int8), int8, {"quant_method": METHOD}) as shards:
        for factors in adapter:
            if f"{factors.parameter}_scale" not in shards.keys:
                continue  # routers stay as they are
            stored, scale = (shards.slice(key)[:].float() for key in (factors.parameter, f"{factors.parameter}_scale"))
            scale = scale.unsqueeze(-2 if factors.is_transposed else -1)
            with source.layer(factors.parameter.rpartition(".")[0]) as layer:
                off = (stored * scale - layer[factors.parameter].float()).abs() / scale.clamp_min(1e-30)
                worst = max(worst, float(off.max()))
    return worst


def _gguf(artifact: Path, base: Path, adapter: list[Factors], skeleton: PreTrainedModel, folder: Path) -> Any:
    write_gguf(adapter, skeleton, folder / "adapter.gguf")
    chat = read_manifest(artifact).get("chat") or {}
    has_template = chat.get("form", "chat") == "chat" and (artifact / TEMPLATE).is_file()
    if has_template:
        shutil.copyfile(artifact / TEMPLATE, folder / TEMPLATE)
    ends = token_text(artifact, read_stops(artifact)) if read_stops(artifact) else []
    (folder / "Modelfile").write_text(modelfile(ends, chat), encoding="utf-8")
    return "updates, over the largest", read_gguf(folder / "adapter.gguf", adapter, skeleton), _FP32_SUMS


_WRITERS = {"peft": _peft, "per-expert": _per_expert, "merged": _merged, "merged-int8": _merged_int8, "gguf": _gguf}
