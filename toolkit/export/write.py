"""Exports: the same adapter in other programs' layouts, each read back and compared before it is called done.

Nothing is converted on trust: a folder gets its name only after its tensors, read from the disk, have given the
adapter's own numbers again, and `export.json` records how near.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
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
from toolkit.checkpoint.config import quantised_as
from toolkit.checkpoint.config import skeleton as skeleton_of
from toolkit.checkpoint.files import METHOD, read_header
from toolkit.checkpoint.identity import files_of, identify_base
from toolkit.durable import staged_folder
from toolkit.errors import DataError, ModelError, RecipeError, ResourceError, first_line
from toolkit.export.card import put_card
from toolkit.export.compressed import merge_compressed
from toolkit.export.gguf import read_gguf, write_gguf
from toolkit.export.gguf_merged import GGUF_FILE, merge_into_gguf
from toolkit.export.into_source import Homes, merge_into_source
from toolkit.export.job import Job, Made
from toolkit.export.merge import DRAFT_FOLDER, left_beside, merge_checkpoint, merged_difference, stitch_head
from toolkit.export.merge_base import require_merge_base
from toolkit.export.mlx import merge_mlx
from toolkit.export.ollama import modelfile, turns_of
from toolkit.export.quants import TAKES_QUANT, is_rounded_again, require_quant
from toolkit.export.server_rules import server_problems
from toolkit.export.survival import LEAST_SHARE, Survival, streamed_logits, survival
from toolkit.export.tokens import put_rows, require_carried, with_weights
from toolkit.steps import part

__all__ = ["FORMATS", "Export", "export_adapter", "is_rounded_again"]

FORMATS = (
    "peft",
    "per-expert",
    "merged",
    "merged-source",
    "merged-int8",
    "gguf",
    "gguf-merged",
    "merged-vllm",
    "merged-mlx",
)
_RECORD = "export.json"
_UPDATES = "updates, over the largest"
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
    merged_into: Mapping[str, Any] | None = None
    """The checkpoint that the adapter was added to, `BaseIdentity` by field, and `as`, what it was taken as."""
    survival: Survival | None = None
    """Where weights were rounded again: how much of the adapter's effect is left."""
    kept: Sequence[str] = ()
    """Tensors of the checkpoint that the model does not use and the merge has; `left_out`, those that it has not."""
    left_out: Sequence[str] = ()
    stored: Mapping[str, int] = field(default_factory=dict)
    """How many tensors are of which type, in layouts that have more than one."""
    fell_back: Sequence[str] = ()
    """Tensors that could not have the type that was asked for, all layers as one: name, type and how many."""
    head: str = ""
    """What became of the multi-token-prediction head, where the adapter or the checkpoint has one."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@part("export")
def export_adapter(
    artifact: str | Path,
    base: str | Path,
    format: str,
    out: str | Path,
    *,
    merge_base: str | Path | None = None,
    texts: Sequence[Sequence[int]] = (),
    labels: Sequence[Sequence[int]] = (),
    quant: str | None = None,
    base_gguf: str | Path | None = None,
    llama_quantize: str | None = None,
    force: bool = False,
) -> Export:
    """Write an artifact in another layout to the new folder `out`.

    Tokenizer, chat template and what ends an answer go along from the artifact, never from the base.

    Args:
        base: folder of the checkpoint that was trained on, or its GGUF file.
        format: one of `FORMATS`.
        merge_base: folder of the checkpoint in 16 bit that `base` was made from: merges start from it.
        texts: token ids, of which a few hundred show how much of the adapter is left where weights are rounded again.
        labels: of each text, its ids where an answer was trained on and IGNORED elsewhere.
        quant: what weights are stored as, in layouts of `TAKES_QUANT`. base_gguf: a GGUF file of the base for one.
        llama_quantize: llama.cpp's program for K-quants, where it is not on PATH.
        force: also write what has lost more than a tenth of the adapter's effect.

    Raises:
        RecipeError: no such format, or `out` exists. ResourceError: the disk is full or broken.
        DataError: weights are to be rounded again, and there are no texts.
        ModelError: the family cannot have this layout, `merge_base` is another model, too little of the adapter would
            be left, or what was written does not give its numbers, tokens or end tokens; nothing is left behind then.
    """
    artifact, base, out = Path(artifact), Path(base), Path(out)
    told = (quant, None if base_gguf is None else Path(base_gguf), llama_quantize)
    _require_asked(format, out, *told)
    verify_artifact(artifact, strict=True)
    require_carried(format, artifact)
    require_base(artifact, str(base))
    skeleton = skeleton_of(str(base))
    adapter = read_factors(artifact, skeleton)
    start, skeleton = _start(base, merge_base if format in _WHOLE else None, adapter, skeleton)
    adapter = with_weights(adapter, start) if format in _WHOLE else adapter
    if is_rounded_again(start, format, quant) and not texts:
        raise DataError(_NO_TEXTS.format(format))
    homes = Homes(start, adapter, skeleton) if format == "merged-source" else None
    try:
        with staged_folder(out) as folder:
            job = Job(artifact, base, start, adapter, skeleton, folder, texts, labels, homes, *told)
            made = _WRITERS[format](job)
            _require_near(format, made, force)
            export = _told(job, format, str(out), made)
            _put_card(export, artifact, folder)
            _record(export, artifact, folder, out.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ResourceError(f"{out}: cannot be exported: {reason}; free space or give another folder") from None
    return export


def _put_card(export: Export, artifact: Path, folder: Path) -> None:
    if export.merged_into is not None:
        library = _LIBRARIES.get(export.format, "transformers")
        put_card(folder, export.merged_into, export.survival, read_manifest(artifact), library)


_WHOLE = ("merged", "merged-int8", *TAKES_QUANT)
"""Layouts that start from the merge base where there is one."""
_LIBRARIES = {"gguf-merged": "gguf", "merged-mlx": "mlx"}
"""What reads a merge, where it is not transformers, by the Hub's name for it."""
_NO_TEXTS = (
    "--format {}: rounds weights again, and what is left of the adapter is measured on texts: give rows like those it "
    "was trained on with --data FILE"
)


def _require_asked(
    format: str, out: Path, quant: str | None, base_gguf: Path | None, llama_quantize: str | None
) -> None:
    if format not in FORMATS:
        raise RecipeError(f"--format {format}: no such layout; known: {', '.join(FORMATS)}")
    if out.exists():
        raise RecipeError(f"{out}: already exists; give another name")
    require_quant(format, quant, base_gguf, llama_quantize)


def _start(
    base: Path, merge_base: str | Path | None, adapter: list[Factors], skeleton: PreTrainedModel
) -> tuple[Path, PreTrainedModel]:
    """What a layout starts from, and that on meta."""
    if merge_base is None:
        return base, skeleton
    require_merge_base(Path(merge_base), base, adapter, skeleton)
    return Path(merge_base), skeleton_of(str(merge_base))


def _require_near(format: str, made: Made, force: bool) -> None:
    if not made.difference <= made.bound:
        raise ModelError(
            f"{format}: what was written is off by {made.difference:.2e}, over {made.bound:.0e}: not exported"
        )
    _require_survival(format, made.survival, force)


def _require_survival(format: str, survival: Survival | None, force: bool) -> None:
    if survival is None or (force and math.isfinite(survival.share)):
        return
    why = "" if survival.share >= LEAST_SHARE else f"less than {LEAST_SHARE:.0%}"
    if format not in TAKES_QUANT:  # there the difference is what rounding costs any model, and the loss shows it
        why = why or ("" if survival.noise <= 1 else "further from the adapted model than its base is")
    if why:
        raise ModelError(f"{format}: {survival}: {why}, not exported; take --format merged, or --force")


def _told(job: Job, format: str, out: str, made: Made) -> Export:
    servers = _servers(job.folder, job.skeleton) if format == "per-expert" else {}
    merged_into = _merged_into(job, format)
    return Export(out, format, servers=servers, merged_into=merged_into, **vars(made))


def _merged_into(job: Job, format: str) -> dict[str, Any] | None:
    if format not in (*_WHOLE, "merged-source"):
        return None
    stored = quantised_as(job.base)
    if format == "merged-source":
        taken = f"itself, in {stored}"
    elif stored is not None:
        taken = f"its {stored} weights multiplied out"
    else:
        taken = "itself" if job.base == job.source else f"the original of {job.source.name}"
    return {**asdict(identify_base(str(job.base))), "as": taken}


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


def _peft(job: Job) -> Made:
    for path in job.artifact.iterdir():
        if path.is_file():
            shutil.copyfile(path, job.folder / path.name)
    back = read_factors(job.folder, job.skeleton)
    return Made(_UPDATES, largest_difference(job.adapter, back), 0.0)


def _per_expert(job: Job) -> Made:
    folder, tensors, rank = job.folder, *per_expert(job.adapter, job.skeleton)
    save_file({name: tensors[name] for name in sorted(tensors)}, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    leaves = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors})
    write_json(folder / ADAPTER_CONFIG, _plain_config(load_adapter_config(job.artifact), rank, leaves))
    _put_words(job, folder)
    back = from_per_expert(load_file(folder / ADAPTER_WEIGHTS), job.adapter, job.skeleton)
    head = left_beside(job.artifact, "servers take none with an adapter")
    return Made(_UPDATES, largest_difference(job.adapter, back), _FP32_SUMS, head=head)


def _plain_config(config: dict[str, Any], rank: int, leaves: list[str]) -> dict[str, Any]:
    """One rank, alpha the same: servers read no patterns."""
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return {**config, **plain, "target_modules": leaves, "target_parameters": None}


def _merged(job: Job) -> Made:
    merged = merge_checkpoint(job.base, job.adapter, job.skeleton, job.folder)
    head = _put_head_and_words(job)
    _, steps = merged_difference(job.base, job.folder, job.adapter)
    put_rows(job.artifact, job.skeleton, job.folder)
    told = "merged weights, in roundings of the checkpoint's dtype"
    return Made(told, steps, 1.01, kept=merged.kept, left_out=merged.left_out, head=head)


def _put_head_and_words(job: Job) -> str:
    """What a merged checkpoint has beside its weights; what became of a head."""
    _put_words(job, job.folder)
    head = stitch_head(job.artifact, job.skeleton, job.folder)
    for checkpoint in (job.folder, job.folder / DRAFT_FOLDER):
        declare_stops(checkpoint, read_stops(job.artifact), files_of(str(job.base)) or job.base)
    return head


def _put_words(job: Job, folder: Path) -> None:
    put_tokenizer(job.artifact, folder)
    put_stops(job.artifact, folder)


def _merged_source(job: Job) -> Made:
    assert job.homes is not None
    merge_into_source(job.homes, job.adapter, job.folder)
    _put_words(job, job.folder)
    declare_stops(job.folder, read_stops(job.artifact), files_of(str(job.base)) or job.base)
    found = survival(job.base, job.adapter, job.texts, partial(streamed_logits, job.folder), job.labels)
    lost = max(0.0, 1 - found.share)
    head = left_beside(job.artifact, "the base's own head is as it was")
    return Made("change of the logits, the share that is lost", lost, max(lost, 1 - LEAST_SHARE), found, head=head)


def _merged_int8(job: Job) -> Made:
    from toolkit.quant.save import quantize_checkpoint

    merged, result = job.folder / "merged", job.folder / "int8"
    merged.mkdir()
    made = _merged(replace(job, folder=merged))
    quantize_checkpoint(str(merged), result)
    if made.difference > made.bound:
        raise ModelError(f"merged-int8: the merge is off by {made.difference:.2f} roundings: not exported")
    off = _int8_steps(merged, result, job.adapter)
    found = None
    if is_rounded_again(job.base, "merged-int8"):
        found = survival(job.base, job.adapter, job.texts, partial(streamed_logits, result), job.labels)
    _put_words(job, result)
    for path in [*result.iterdir(), *merged.glob(DRAFT_FOLDER)]:
        path.rename(job.folder / path.name)
    result.rmdir()
    shutil.rmtree(merged)
    return Made("merged weights, in int8 steps", off, 0.51, found, made.kept, made.left_out, head=made.head)


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


def _gguf(job: Job) -> Made:
    folder = job.folder
    write_gguf(job.adapter, job.skeleton, folder / "adapter.gguf")
    _put_modelfile(job, ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"])
    off = read_gguf(folder / "adapter.gguf", job.adapter, job.skeleton)
    return Made(_UPDATES, off, _FP32_SUMS, head=left_beside(job.artifact, "llama.cpp takes none with an adapter"))


def _put_modelfile(job: Job, begins: Sequence[str]) -> None:
    """What `ollama create` reads, and the chat template beside it for llama-server."""
    artifact, folder = job.artifact, job.folder
    chat = read_manifest(artifact).get("chat") or {}
    if chat.get("form", "chat") == "chat" and (artifact / TEMPLATE).is_file():
        shutil.copyfile(artifact / TEMPLATE, folder / TEMPLATE)
    ends = token_text(artifact, read_stops(artifact)) if read_stops(artifact) else []
    (folder / "Modelfile").write_text(modelfile(begins, ends, chat, turns_of(artifact, chat)), encoding="utf-8")


def _gguf_merged(job: Job) -> Made:
    made = merge_into_gguf(job)
    _put_modelfile(job, [f"FROM ./{GGUF_FILE}"])
    return made


def _merged_vllm(job: Job) -> Made:
    made = merge_compressed(job)
    return replace(made, head=_put_head_and_words(job))


def _merged_mlx(job: Job) -> Made:
    made = merge_mlx(job)
    _put_words(job, job.folder)
    declare_stops(job.folder, read_stops(job.artifact), files_of(str(job.base)) or job.base)
    return replace(made, head=left_beside(job.artifact, "mlx-lm reads none"))


_WRITERS: dict[str, Callable[[Job], Made]] = {
    "peft": _peft,
    "per-expert": _per_expert,
    "merged": _merged,
    "merged-source": _merged_source,
    "merged-int8": _merged_int8,
    "gguf": _gguf,
    "gguf-merged": _gguf_merged,
    "merged-vllm": _merged_vllm,
    "merged-mlx": _merged_mlx,
}
