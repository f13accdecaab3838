"""NVIDIA's modelopt: FP8 and int8, NVFP4 whose two scales are both multiplied, MXFP4, MXFP8, and int4.

gpt-oss' stacks stay fused, [E, inputs, outputs] packed along the inputs, with `gate_up_proj_weight_scale` beside them.
Inputs that are divided by `pre_quant_scale` before they meet a weight are multiplied into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from toolkit.checkpoint.formats.bits import FP4_LEVELS, fp4, fp4_codes, grid, nibbles, pairs, powers
from toolkit.checkpoint.formats.packed import FLOATS, Encoder, Files, FourBit, Packed, Part, Tensors, Unpack
from toolkit.checkpoint.formats.scaled import scaled

__all__ = ["four_bit_floats", "read_modelopt"]

_NV_GROUPS = (16, 32)
_MX_GROUP = 32
_SCALE = "weight_scale"


def read_modelopt(files: Files) -> Iterator[Packed]:
    """Every weight with a `weight_scale`.

    Raises:
        ModelError: parts that do not fit together, or a stack whose inputs have scales of their own.
    """
    for scales in [key for key in files.headers if key.endswith((f".{_SCALE}", f"_proj_{_SCALE}"))]:
        stem = scales.removesuffix(_SCALE)
        is_stack = stem.endswith("_")
        key = stem[:-1] if is_stack else f"{stem}weight"
        files.shape(key)
        if files.headers[key].dtype != "U8":
            found = scaled(files, key, scales)
        elif is_stack or len(files.shape(key)) != 2 or files.shape(scales)[:1] == files.shape(key)[:1]:
            found = four_bit_floats(files, key, stem, is_stack)
        else:
            found = _four_bit_integers(files, key, scales)
        yield _for_inputs(files, found, f"{stem}pre_quant_scale")


def four_bit_floats(files: Files, key: str, stem: str, is_stack: bool) -> Packed:
    """NVFP4 and MXFP4: [O, I/2] bytes with [O, I/G] scales; a stack [E, I/2, O] with [E, I/G, O].

    Args:
        stem: what the names of all parts begin with.

    Raises:
        ModelError: parts that do not fit together.
    """
    scales = f"{stem}{_SCALE}"
    stored, found = files.shape(key), files.shape(scales)
    inputs = len(stored) - (2 if is_stack else 1)
    if len(stored) != (3 if is_stack else 2) or len(found) != len(stored):
        raise files.wrong(key, f"{'×'.join(map(str, stored))} bytes do not fit {'×'.join(map(str, found))} scales")
    shape = tuple(2 * size if place == inputs else size for place, size in enumerate(stored))
    group = shape[inputs] // found[inputs]
    others = [place for place in range(len(shape)) if place != inputs]
    fits = group * found[inputs] == shape[inputs] and all(shape[place] == found[place] for place in others)
    is_mx = files.headers[scales].dtype in ("U8", "F8_E8M0")
    if not fits or group not in ((_MX_GROUP,) if is_mx else _NV_GROUPS):
        raise files.wrong(key, "is no NVFP4 or MXFP4 weight: its scales do not fit")
    parts = {"packed": Part(key), "scale": Part(scales)}
    if not is_mx:
        parts["global"] = Part(f"{scales}_2", None)
        files.check_one(f"{scales}_2", *FLOATS)
    unpack = partial(_unpack_floats, is_mx=is_mx, is_stack=is_stack)
    kept = FourBit("mxfp4", group, _codes) if is_mx and not is_stack else None
    units = partial(_float_units, group=group, is_mx=is_mx, is_stack=is_stack)
    encoder = Encoder(FP4_LEVELS, units, partial(_store_floats, is_stack=is_stack))
    words = f"{'MXFP4' if is_mx else 'NVFP4'}, groups of {group}"
    return files.packed(key, shape, parts, unpack, words, kept, encoder)


def _codes(parts: Tensors) -> tuple[Tensor, Tensor]:
    return nibbles(parts["packed"]), parts["scale"].view(torch.uint8)


def _unpack_floats(parts: Tensors, *, is_mx: bool, is_stack: bool) -> Tensor:
    packed, scale = parts["packed"], _scale(parts, is_mx)
    if not is_stack:
        return _times(fp4(packed), scale)
    return _times(fp4(packed.transpose(1, 2)), scale.transpose(1, 2)).transpose(1, 2)


def _scale(parts: Tensors, is_mx: bool) -> Tensor:
    scale = parts["scale"]
    return powers(scale) if is_mx else scale.float() * parts["global"].float().reshape(())


def _float_units(parts: Tensors, *, group: int, is_mx: bool, is_stack: bool) -> tuple[Tensor, None]:
    return _scale(parts, is_mx).repeat_interleave(group, 1 if is_stack else -1), None


def _store_floats(levels: Tensor, parts: Tensors, *, is_stack: bool) -> dict[str, Tensor]:
    codes = fp4_codes(levels)
    return {"packed": pairs(codes.transpose(1, 2)).transpose(1, 2) if is_stack else pairs(codes)}


def _times(values: Tensor, scale: Tensor) -> Tensor:
    return values * scale.repeat_interleave(values.shape[-1] // scale.shape[-1], -1)


def _four_bit_integers(files: Files, key: str, scales: str) -> Packed:
    """[O/2, I] bytes, each of an even output and, in its high half, the odd one after it."""
    (half, inputs), found = files.matrix(key), files.matrix(scales)
    group = inputs // found[1]
    fits = found[0] == 2 * half and group * found[1] == inputs and group.bit_count() == 1
    if not fits or f"{scales}_2" in files.headers:
        raise files.wrong(key, f"{half}×{inputs} bytes do not fit {found[0]}×{found[1]} scales")
    parts = {"packed": Part(key, 0, Fraction(2)), "scale": Part(scales)}
    stored = f"int4, groups of {group}"
    encoder = Encoder(tuple(range(-8, 8)), _integer_units, _store_integers)
    return files.packed(key, (2 * half, inputs), parts, _unpack_integers, stored, None, encoder)


def _unpack_integers(parts: Tensors) -> Tensor:
    packed = parts["packed"]
    codes = torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1)
    return ((codes ^ 8).float() - 8) * grid(parts["scale"], *codes.shape)


def _integer_units(parts: Tensors) -> tuple[Tensor, None]:
    half, inputs = parts["packed"].shape
    return grid(parts["scale"], 2 * half, inputs), None


def _store_integers(levels: Tensor, parts: Tensors) -> dict[str, Tensor]:
    codes = levels.to(torch.int16).to(torch.uint8) & 15
    return {"packed": codes[0::2] | codes[1::2] << 4}


def _for_inputs(files: Files, packed: Packed, key: str) -> Packed:
    """With what its inputs are multiplied by, one an input, where there is such a tensor."""
    if key not in files.headers:
        return packed
    if len(packed.shape) != 2 or files.shape(key) != packed.shape[-1:]:
        raise files.wrong(key, f"does not fit a weight of {'×'.join(map(str, packed.shape))}")
    parts = {**packed.parts, "inputs": Part(key, None)}
    size = packed.bytes + files.headers[key].bytes
    unpack = partial(_unpack_for_inputs, of=packed.unpack)
    encoder = packed.encoder and replace(packed.encoder, units=partial(_units_for_inputs, of=packed.encoder.units))
    return replace(packed, parts=parts, unpack=unpack, bytes=size, four_bit=None, encoder=encoder)


def _units_for_inputs(
    parts: Tensors, *, of: Callable[[Tensors], tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    scale, offset = of(parts)
    inputs = parts["inputs"].float()
    return scale * inputs, offset if offset is None else offset * inputs


def _unpack_for_inputs(parts: Tensors, *, of: Unpack) -> Tensor:
    return of(parts) * parts["inputs"].float()
