"""A merged checkpoint in mlx-lm's layout, in 4 or 8 bits: what runs on a Mac as it is.

mlx-lm converts whole models, on a Mac or with a package of its own, and rounds routers to 4 bits where nobody stops it:
the chosen experts then change. Here routers stay floats, embedding and head are in 8 bits, and each stack of experts
is one tensor, as mlx-lm holds it. `scripts/parity/merged_checkpoints.py` has mlx read the files.
Source: `mlx_lm/utils.py`, `models/switch_layers.py` and each model's `sanitize` in mlx-lm 0.32.2; the arithmetic is
that of `mx.quantize(mode="affine")`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toolkit.architecture import LINEAR_ROLES, describe
from toolkit.artifact.manifest import write_json
from toolkit.checkpoint.formats.bits import words
from toolkit.checkpoint.formats.gguf_names import original_names
from toolkit.errors import ModelError
from toolkit.export.checkpoint_writer import ReadBack, Shard, difference
from toolkit.export.job import ROUNDED, Job, Made
from toolkit.export.merge import merged_parameters, put_beside
from toolkit.families import MLX_EXPERTS, MLX_TAKES_FOR_GRANTED
from toolkit.quant.source import SourceWeights

__all__ = ["BITS", "merge_mlx"]

BITS = {"4bit": 4, "8bit": 8}
"""By the name that `--quant` takes."""
_ENDS_BITS = 8
"""Of embedding and head."""
_GROUPS = (64, 32)
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def merge_mlx(job: Job) -> Made:
    """Write the merged checkpoint into the job's folder, read it back and compare it; measure it where there are texts.

    Raises:
        ModelError: mlx-lm computes something else of this family.
    """
    bits = BITS[job.quant or ""]
    layout, source = _Layout(job, bits), SourceWeights(str(job.base))
    shard, stored = Shard(job.folder), {f"{bits} bits": 0, "8 bits": 0, "as they were": 0}
    for name, value in merged_parameters(source, job.adapter):
        dtype = source.stored_dtype(name) if value.is_floating_point() else value.dtype
        for key, part in layout.of(name, value):
            width = layout.bits_of(name, part.shape[-1])
            stored["as they were" if width is None else f"{width} bits"] += 1
            shard.add({key: part.to(dtype)} if width is None else _affine(key, part, width, layout.group, dtype))
            if width not in (None, bits):
                layout.others[key.removesuffix(".weight")] = width
    beside, left_out = source.unused()
    most = max((dtype for dtype in shard.sizes if dtype in _DTYPES), key=shard.sizes.__getitem__)
    put_beside(job.base, job.skeleton, job.folder, most)
    shard.close()  # after what lies beside the base, whose index is there too
    _declare(job, layout, bits, most)
    back = ReadBack(job.folder)
    try:
        worst = difference(job.base, job.adapter, back, partial(_allowed, layout, source))
    finally:
        back.close()
    left = job.measured(job.folder)
    gone = (*(key for keys in beside.values() for key in keys), *left_out)
    return Made(
        ROUNDED, worst, 1.0, left, left_out=gone, stored={kind: count for kind, count in stored.items() if count}
    )


class _Layout:
    """mlx-lm's keys of each parameter, and which are rounded."""

    def __init__(self, job: Job, bits: int) -> None:
        model = job.skeleton
        model_type = str(model.config.model_type)
        if model_type not in MLX_EXPERTS:
            raise ModelError(
                f"merged-mlx: {model_type} is none of the families that mlx-lm was seen to compute alike "
                f"({', '.join(sorted(MLX_EXPERTS))}): export as merged, and convert it with mlx_lm.convert"
            )
        for field, granted in MLX_TAKES_FOR_GRANTED.get(model_type, {}).items():
            if (said := getattr(model.config, field, None)) and said != granted:
                raise ModelError(
                    f"merged-mlx: {field} is {said} in this model, and mlx-lm takes {granted} for granted: export as "
                    "merged"
                )
        self._leaf, self._bits, self._original = MLX_EXPERTS[model_type], bits, original_names(model)
        self._layers = {name: layer for layer in describe(model).layers for name in layer.stacks}
        self._layers |= {f"{name}_bias": layer for name, layer in list(self._layers.items())}
        self._joined = {
            layer.name: bool(getattr(model.get_submodule(layer.name), "is_concatenated", True))
            for layer in self._layers.values()
        }
        names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        self._ends = {names.get(id(module)) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
        linears = {f"{name}.weight" for name in describe(model).linear_names(*LINEAR_ROLES)}
        self._rounded = {name for name in linears if not name.endswith(".kv_b_proj.weight")}
        state = model.state_dict()
        widths = {state[name].shape[-1] for name in self._rounded | self._ends if name in state}
        self.group = next((group for group in _GROUPS if all(width % group == 0 for width in widths)), _GROUPS[-1])
        self.others: dict[str, int] = {}

    def of(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Stacks [E, O, I] by projection, biases [E, O]; everything else under the family's own name."""
        if (layer := self._layers.get(name)) is None:
            if name not in self._original:
                raise ModelError(f"{name}: the family's files store it together with others: export as merged")
            yield self._original[name], value
            return
        kind = "bias" if name.endswith("_bias") else "weight"
        rows = value.transpose(1, 2) if layer.is_transposed and kind == "weight" else value
        block = re.match(r".*\.layers\.\d+\.[^.]+", self._original[f"{layer.router}.weight"])
        assert block is not None
        place = f"{block[0]}.{self._leaf}"
        if name.removesuffix("_bias") == layer.stacks[1]:
            yield f"{place}.down_proj.{kind}", rows
            return
        gate, up = rows.chunk(2, dim=1) if self._joined[layer.name] else (rows[:, ::2], rows[:, 1::2])
        yield f"{place}.gate_proj.{kind}", gate
        yield f"{place}.up_proj.{kind}", up

    def is_turned(self, name: str) -> bool:
        """Whether the model has inputs before outputs."""
        return name in self._layers and self._layers[name].is_transposed and not name.endswith("_bias")

    def bits_of(self, name: str, inputs: int) -> int | None:
        """Of a parameter with so many inputs; None where it stays a float."""
        if inputs % self.group or name.endswith("_bias"):
            return None
        if name in self._ends:
            return _ENDS_BITS
        return self._bits if name in self._rounded or name in self._layers else None


def _affine(key: str, values: Tensor, bits: int, group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A matrix [O, I], or a stack of them, by mlx's names: codes in uint32 words, a scale and a bias a group.

    The end of a group that is further from 0 is hit exactly, and so is 0 itself.
    """
    module, made = key.removesuffix(".weight"), list[dict[str, Tensor]]()
    for matrix in values if values.dim() == 3 else values[None]:
        groups = matrix.unflatten(-1, (-1, group))
        least, most = groups.amin(-1), groups.amax(-1)
        is_below, top = least.abs() > most.abs(), 2**bits - 1
        scale = ((most - least) / top).clamp_min(1e-7) * torch.where(is_below, 1.0, -1.0)
        edge = torch.where(is_below, least, most)
        steps = (edge / scale).round()
        scale = torch.where(steps == 0, scale, edge / steps).to(dtype)
        bias = torch.where(steps == 0, 0.0, edge).to(dtype)
        codes = ((groups - bias.float()[..., None]) / scale.float()[..., None]).round().clamp(0, top).flatten(-2)
        packed = words(codes.to(torch.uint8), bits, codes.shape[-1] * bits // 32).view(torch.uint32)
        made.append({f"{module}.weight": packed, f"{module}.scales": scale, f"{module}.biases": bias})
    if values.dim() == 2:
        return made[0]
    return {name: torch.stack([one[name] for one in made]) for name in made[0]}


def _declare(job: Job, layout: _Layout, bits: int, dtype: torch.dtype) -> None:
    """What mlx-lm reads in config.json: names of before transformers 5, and how weights are stored."""
    path = job.folder / "config.json"
    config = json.loads(path.read_bytes())
    ours = job.skeleton.config
    config |= {alias: getattr(ours, alias) for alias in ours.attribute_map if getattr(ours, alias, None) is not None}
    config.setdefault("head_dim", ours.hidden_size // ours.num_attention_heads)
    config["tie_word_embeddings"] = bool(ours.tie_word_embeddings)
    config["torch_dtype"] = _DTYPES[dtype]
    rope: dict[str, Any] = dict(ours.rope_parameters or {})
    config["rope_theta"] = rope.pop("rope_theta", None)
    config["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
    if rope.get("rope_type", "default") == "default" and hasattr(ours, "kv_lora_rank"):
        # Latent attention is read there as if it were always stretched: by 1 is not at all.
        rope = {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": ours.max_position_embeddings}
    is_plain = rope.get("rope_type", "default") == "default"
    stretched = {**rope, "type": rope.get("rope_type"), "rope_theta": config["rope_theta"]}
    config["rope_scaling"] = None if is_plain else stretched
    how = {"group_size": layout.group, "mode": "affine"}
    told = {**how, "bits": bits, **{name: {**how, "bits": other} for name, other in sorted(layout.others.items())}}
    write_json(path, {**config, "quantization": told, "quantization_config": told})


def _allowed(layout: _Layout, source: SourceWeights, name: str, values: Tensor) -> float:
    """A step, which an end that is hit exactly may cost, and the rounding of scale and bias."""
    width = layout.bits_of(name, values.shape[-2 if layout.is_turned(name) else -1])
    by = torch.finfo(source.stored_dtype(name)).eps
    return (by if width is None else 2 / (2**width - 1) + 2 * by) * float(values.abs().max())
