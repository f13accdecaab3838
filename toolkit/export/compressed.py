"""A merged checkpoint in compressed-tensors' formats, which vLLM and SGLang serve: FP8, int8 or int4 weights.

The package starts from a whole model in memory. Its layouts are plain: here each weight is rounded with its own
arithmetic when it is merged, and what it makes of the file is compared in `scripts/parity/merged_checkpoints.py`.
Routers, head, embeddings and norms stay floats; activations are rounded by the server, for each token (FP8), or not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.architecture import LINEAR_ROLES, describe
from toolkit.artifact.manifest import write_json
from toolkit.checkpoint.formats.bits import words
from toolkit.export.checkpoint_writer import ReadBack, Shard, Splits, difference
from toolkit.export.job import ROUNDED, Job, Made
from toolkit.export.merge import merged_parameters, put_beside
from toolkit.quant.source import SourceWeights

__all__ = ["SCHEMES", "merge_compressed"]


@dataclass(frozen=True)
class _Scheme:
    """The package's name of the layout, bits of a weight, and the most that one moves, in the largest of its group."""

    format: str
    bits: int
    rounds_by: float
    by_group: bool = False


_SCALE = 2**-8
"""A scale is rounded to bf16, twice: a value is rounded by it, and the last one is cut off."""
SCHEMES: Mapping[str, _Scheme] = {
    "fp8": _Scheme("float-quantized", 8, 2**-4 + _SCALE),
    "int8": _Scheme("pack-quantized", 8, 1 / 127.5 + _SCALE, by_group=True),
    "int4": _Scheme("pack-quantized", 4, 1 / 7.5 + _SCALE, by_group=True),
}
"""By the name that `--quant` takes: the package's presets FP8_DYNAMIC, W8A16 and W4A16."""
_GROUPS = (128, 64, 32)
"""Inputs that share a scale: the first that divides every weight's; a scale a row where none does."""
_LARGEST = 448.0
"""Of E4M3."""


def merge_compressed(job: Job) -> Made:
    """Write the merged checkpoint into the job's folder, read it back and compare it; measure it where there are texts.

    Raises:
        ModelError: the family's files hold experts in one tensor.
    """
    scheme = SCHEMES[job.quant or ""]
    splits, source = Splits(job.skeleton, "merged-vllm"), SourceWeights(str(job.base))
    rounded = {f"{name}.weight" for name in describe(job.skeleton).linear_names(*LINEAR_ROLES)} | splits.stacks.keys()
    group = _group(job, rounded, scheme)
    shard, plain = Shard(job.folder), list[str]()
    for name, value in merged_parameters(source, job.adapter):
        dtype = source.stored_dtype(name) if value.is_floating_point() else value.dtype
        for key, part in splits.of(name, value):
            if name in rounded:
                shard.add(_stored(key, part, scheme, group, dtype))
            else:
                shard.add({key: part.to(dtype)})
                plain += [key] * (part.dim() == 2)
    beside, left_out = source.unused()
    kept = [key for keys in beside.values() for key in keys]
    for key, tensor in source.plain(kept).items():
        shard.add({key: tensor})
        plain += [key] * (tensor.dim() == 2)
    put_beside(job.base, job.skeleton, job.folder, shard.sizes.most_common(1)[0][0])
    shard.close()  # after what lies beside the base, whose index is there too
    _declare(job.folder, scheme, group, [key.removesuffix(".weight") for key in plain])
    worst = _compared(job, rounded, scheme)
    left = job.measured(job.folder)
    stored = {job.quant or "": sum(len(splits.stacks.get(name, ".")) for name in rounded), "as they were": len(plain)}
    return Made(ROUNDED, worst, 1.0, left, tuple(kept), left_out, stored)


def _group(job: Job, rounded: set[str], scheme: _Scheme) -> int | None:
    if not scheme.by_group:
        return None
    transposed = {n for layer in describe(job.skeleton).layers if layer.is_transposed for n in layer.stacks}
    state = job.skeleton.state_dict()
    widths = {state[name].shape[-2 if name in transposed else -1] for name in rounded}
    return next((group for group in _GROUPS if all(width % group == 0 for width in widths)), None)


def _stored(key: str, values: Tensor, scheme: _Scheme, group: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parts of one weight [O, I], by the package's names; its arithmetic."""
    module, groups = key.removesuffix(".weight"), values.unflatten(1, (-1, group or values.shape[1]))
    steps = _LARGEST if scheme.format == "float-quantized" else (2**scheme.bits - 1) / 2
    scale = (groups.abs().amax(-1) / steps).to(dtype)
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    exact = groups / scale.float()[..., None]
    if scheme.format == "float-quantized":
        codes = exact.clamp(-_LARGEST, _LARGEST).flatten(1).to(torch.float8_e4m3fn)
        return {f"{module}.weight": codes, f"{module}.weight_scale": scale}
    half = 2 ** (scheme.bits - 1)
    codes = (exact.round().clamp(-half, half - 1) + half).flatten(1).to(torch.uint8)
    count = -(-codes.shape[1] * scheme.bits // 32)
    return {
        f"{module}.weight_packed": words(codes, scheme.bits, count),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor(values.shape),
    }


def _declare(folder: Path, scheme: _Scheme, group: int | None, ignored: list[str]) -> None:
    """As the package says it in config.json; `ignored` are all linears that stay floats, by name."""
    is_float = scheme.format == "float-quantized"
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "float" if is_float else "int", "symmetric": True}
    weights |= {"strategy": "group" if group else "channel", "group_size": group, "dynamic": False}
    token = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    scheme_of = {"targets": ["Linear"], "weights": weights, "input_activations": token if is_float else None}
    path = folder / "config.json"
    declared = {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**scheme_of, "output_activations": None, "format": scheme.format}},
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    write_json(path, {**json.loads(path.read_bytes()), "quantization_config": declared})


def _compared(job: Job, rounded: set[str], scheme: _Scheme) -> float:
    """What is off at most, in what its type allows; floats by half a rounding of their dtype."""
    back = ReadBack(job.folder)
    source = SourceWeights(str(job.base))

    def allowed(name: str, values: Tensor) -> float:
        by = scheme.rounds_by if name in rounded else torch.finfo(source.stored_dtype(name)).eps
        return by * float(values.abs().max())

    try:
        return difference(job.base, job.adapter, back, allowed)
    finally:
        back.close()
