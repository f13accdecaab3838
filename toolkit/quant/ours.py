"""onecard's own checkpoints as weights multiplied out, by the model's own names; and how others are written into them.

`from_pretrained` keeps such weights as they are stored. What goes through a checkpoint in floats, layer by layer, reads
them here as it reads what others quantised.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolkit.architecture import describe
from toolkit.checkpoint.conversion import Shards
from toolkit.checkpoint.files import METHOD
from toolkit.checkpoint.formats.bits import FP4_LEVELS, fp4_codes, powers
from toolkit.checkpoint.formats.packed import Encoder, Packed, Part, Tensors
from toolkit.checkpoint.weights import PackedSlice, Unread, unread
from toolkit.ops.four_bit import kind_of, packed_codes, turned
from toolkit.quant.stored import BESIDE, multiplied_out

__all__ = ["own_weights"]

_LEVELS = {"int8": range(-127, 128), "int4": range(-8, 8), "grouped": range(-8, 8), "mxfp4": FP4_LEVELS}


def own_weights(folder: Path, model: PreTrainedModel) -> dict[str, Unread]:
    """Every weight of a checkpoint that `quantize_checkpoint` wrote, unread.

    Args:
        model: on meta.

    Raises:
        ModelError: a shard is missing or damaged.
    """
    transposed = {name for layer in describe(model).layers if layer.is_transposed for name in layer.stacks}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with Shards(str(folder), folder, {"quant_method": METHOD}) as shards:
        slices = {key: shards.slice(key) for key in shards.keys}
    beside = {f"{key}{ending}" for key in slices for ending in BESIDE[1:] if f"{key}_scale" in slices}
    result: dict[str, Unread] = {}
    for key, stored in slices.items():
        if f"{key}_scale" in slices and key in shapes:
            result[key] = _packed(key, slices, shapes[key], key in transposed)
        elif key not in beside:
            result[key] = unread(stored, key)
    return result


def _packed(key: str, slices: dict[str, Any], shape: tuple[int, ...], is_transposed: bool) -> PackedSlice:
    keys = [f"{key}{ending}" for ending in BESIDE if f"{key}{ending}" in slices]
    parts = {f"w{part.removeprefix(key)}": Part(part) for part in keys}
    few = {name: slices[part.key][:1] for name, part in parts.items()}
    kind = kind_of(few["w"], few["w_scale"], few.get("w_step")) or "int8"
    encoder = Encoder(
        tuple(_LEVELS[kind]),
        partial(_units, kind=kind, is_transposed=is_transposed),
        partial(_store, kind=kind, is_transposed=is_transposed),
    )
    unpack = partial(multiplied_out, name="w", is_transposed=is_transposed)
    size = sum(slices[part][...].nbytes for part in keys)
    packed = Packed(key, shape, parts, unpack, f"onecard's {kind}", size, encoder=encoder)
    return PackedSlice(packed, {part: slices[part] for part in keys})


def _units(parts: Tensors, *, kind: str, is_transposed: bool) -> tuple[Tensor, None]:
    scale = parts["w_scale"]
    if kind == "int8":
        return scale.unsqueeze(-2 if is_transposed else -1), None
    beside = parts["w_step"].float() * scale.unsqueeze(-2) if kind == "int4" else scale
    beside = powers(beside) if kind == "mxfp4" else beside.float()
    unit = beside.repeat_interleave(2 * parts["w"].shape[-2] // beside.shape[-2], -2)
    return unit if is_transposed else unit.transpose(-1, -2), None


def _store(levels: Tensor, parts: Tensors, *, kind: str, is_transposed: bool) -> dict[str, Tensor]:
    if kind == "int8":
        return {"w": levels.to(torch.int8)}
    levels = levels.transpose(-1, -2) if is_transposed else levels
    if kind == "int4":
        return {"w": packed_codes(levels)}
    return {"w": turned(fp4_codes(levels) if kind == "mxfp4" else (levels + 8).to(torch.uint8))}
