"""MLX: dense streams of codes with a scale and a bias a group, or the MX and NVIDIA formats without biases.

transformers' Metal files hold the first of them, under the name `qbiases`.
Files of mlx-lm say group, bits and mode once, with an entry for each module that differs. Bits follow from the shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from toolkit.checkpoint.formats.bits import fields, fp4, nibbles, powers
from toolkit.checkpoint.formats.packed import FLOATS, Files, FourBit, Packed, Part, Tensors

__all__ = ["read_mlx"]

_LARGEST = 6 * 448
"""Of FP4's codes times E4M3's."""
_GROUP = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}


def read_mlx(files: Files) -> Iterator[Packed]:
    """Every weight, or stack of experts, with `scales` beside it.

    Raises:
        ModelError: an unknown mode, or parts that do not fit together.
    """
    for module in files.modules("scales"):
        key = f"{module}.weight"
        declared = _own(files, module) or files.declared
        mode = str(declared.get("mode") or "affine")  # an entry of its own inherits nothing
        mode = mode if files.headers[f"{module}.scales"].dtype == "U8" else "affine"
        group = declared.get("group_size") or _GROUP.get(mode)
        if mode not in _GROUP or not isinstance(group, int) or group < 1:
            raise files.wrong(module, f"stored in mode {mode!r} with groups of {group!r}, which is not read")
        shape, scales = files.shape(key), files.shape(f"{module}.scales")
        files.check_dtype(key, "U32", "I32")
        columns = scales[-1] * group if scales else 0
        bits = shape[-1] * 32 // max(1, columns) if shape else 0
        if shape[:-1] != scales[:-1] or not 1 <= bits <= 8 or bits * columns != shape[-1] * 32:
            raise files.wrong(key, f"{'×'.join(map(str, shape))} words do not fit groups of {group}")
        if declared.get("bits", bits) != bits:
            raise files.wrong(key, f"holds {bits} bits a value, and the config says {declared['bits']}")
        parts = {"codes": Part(key), "scales": Part(f"{module}.scales")}
        if mode == "affine":
            biases = "qbiases" if files.declared.get("quant_method") == "metal" else "biases"
            parts["biases"] = Part(f"{module}.{biases}")
            for part in ("scales", biases):
                files.check_dtype(f"{module}.{part}", *FLOATS)
            if files.shape(f"{module}.{biases}") != scales:
                raise files.wrong(f"{module}.{biases}", "does not fit the scales beside it")
        elif (bits, mode) not in ((4, "mxfp4"), (8, "mxfp8"), (4, "nvfp4")):
            raise files.wrong(key, f"{bits} bits in mode {mode}")
        if (whole := f"{module}.global_scale") in files.headers or declared.get("global_scale"):
            if files.shape(whole) not in (shape[: len(shape) - 2], (1,)):
                raise files.wrong(whole, "is neither one scale nor one an expert")
            parts["global"] = Part(whole, 0 if files.shape(whole) == shape[:1] else None)
        unpack = partial(_unpack, bits=bits, group=group, mode=mode)
        words = f"int{bits}" if mode == "affine" else mode.upper()
        kept = FourBit("mxfp4", group, _codes) if mode == "mxfp4" else None
        yield files.packed(key, (*shape[:-1], columns), parts, unpack, f"{words}, groups of {group}", kept)


def _codes(parts: Tensors) -> tuple[Tensor, Tensor]:
    return nibbles(parts["codes"]), parts["scales"]


def _own(files: Files, module: str) -> Mapping[str, object]:
    own = files.declared.get(module)
    return own if isinstance(own, Mapping) else {}


def _unpack(parts: Tensors, *, bits: int, group: int, mode: str) -> Tensor:
    stored, scales = parts["codes"], parts["scales"]
    if mode == "mxfp8":
        values = stored.contiguous().view(torch.float8_e4m3fn).float()
    else:
        values = fields(stored, bits, scales.shape[-1] * group).float() if mode == "affine" else fp4(stored)
    if mode == "affine":
        spread = scales.float().repeat_interleave(group, -1)
        return values * spread + parts["biases"].float().repeat_interleave(group, -1)
    scale = scales.view(torch.float8_e4m3fn).float() if mode == "nvfp4" else powers(scales)
    if "global" in parts:  # the largest value, which the largest code times the largest scale stands for
        scale = scale * (parts["global"].float() / _LARGEST).reshape(-1, *[1] * (scale.dim() - 1))
    return values * scale.repeat_interleave(group, -1)
