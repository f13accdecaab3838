"""8-bit values with scales beside them: FP8 and int8 of a row, group, block or whole tensor, MXFP8, and packed FP4.

transformers' own FP8 files have this form (`weight_scale_inv`, which multiplies), compressed-tensors' and modelopt's
too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from toolkit.checkpoint.formats.bits import FP4_LEVELS, fp4, fp4_codes, fp8_levels, grid, pairs, powers
from toolkit.checkpoint.formats.packed import Encoder, Files, Packed, Part, Tensors

__all__ = ["groups_in_words", "read_fp8", "scaled"]

_MX_GROUP = 32
_EXPONENTS = ("U8", "F8_E8M0")
_NIBBLES = ("I8", "F4")
"""What two FP4 values lie in, in DeepSeek's files; an int8 weight of this format has no other meaning."""
_FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def read_fp8(files: Files) -> Iterator[Packed]:
    """What transformers calls fp8, mxfp8 and fbgemm_fp8: a weight, or a stack, with `_scale_inv` or `_scale` beside it.

    GPTQModel's FP8 has the same names and divides by the scales: `weight_scale_semantics` says so.

    Raises:
        ModelError: a scale without its weight, or a grid of scales that does not fit.
    """
    semantics = files.declared.get("weight_scale_semantics")
    if semantics not in (None, "inverse"):
        raise files.not_read("weight_scale_semantics", f"the quantization_config says {str(semantics)[:80]!r}")
    declared = files.declared.get("weight_block_size")
    block = None
    if declared is not None:
        sizes = declared if isinstance(declared, (list, tuple)) else []
        block = tuple(size for size in sizes if type(size) is int and size > 0)
        if len(block) != 2 or len(sizes) != 2:
            raise files.wrong("weight_block_size", f"the quantization_config says {str(declared)[:80]}")
    for ending in ("_scale_inv", "_scale"):
        for scales in [key for key in files.headers if key.endswith(ending)]:
            key = scales.removesuffix(ending)
            if key in files.headers and files.headers[key].dtype.startswith(("F8_", *_NIBBLES)):
                yield scaled(files, key, scales, block, is_divided=semantics is not None)  # type: ignore[arg-type]
            elif key.rpartition(".")[2] in ("weight", "gate_up_proj", "down_proj") and key not in files.headers:
                raise files.wrong(scales, f"there is no {key} that it belongs to")


def scaled(
    files: Files,
    key: str,
    scales: str,
    block: tuple[int, int] | None = None,
    zero: str | None = None,
    name: str | None = None,
    is_divided: bool = False,
) -> Packed:
    """A weight [rows, columns], or a stack [E, rows, columns], of 8-bit values, or of two FP4 values a byte.

    Args:
        block: rows and columns of a block, where the files say it; else what divides evenly.
        zero: the key of zero points, in the form of the scales. name: of the weight, where its key is another.
        is_divided: values are divided by the scales, not multiplied.
    """
    shape, found, dtype = files.shape(key), files.shape(scales), files.headers[key].dtype
    if len(found) == 4 and found[1] == found[3] == 1:  # square blocks as modelopt writes them
        found = (found[0], found[2])
        block = (-(-shape[0] // found[0]),) * 2 if shape else None
    if zero is not None and files.shape(zero) != found:
        raise files.wrong(zero, f"is {'×'.join(map(str, files.shape(zero)))} for {'×'.join(map(str, found))} scales")
    is_fp4 = dtype in _NIBBLES and zero is None and files.headers[scales].dtype in _EXPONENTS
    if is_fp4:
        shape, block = (*shape[:-1], 2 * shape[-1]), (1, _MX_GROUP)
    elif not dtype.startswith("F8_") and dtype != "I8":
        raise files.wrong(key, f"scaled values in {dtype}, which no known format has")
    if len(shape) not in (2, 3):
        raise files.wrong(key, f"has {len(shape)} dimensions")
    block = _fitting(files, key, shape, found, block)
    part = Part(scales, None)
    if len(shape) == 3:
        part = Part(scales, 0 if found and found[0] == shape[0] else None)
    elif len(found) in (1, 2) and found[0] == shape[0] > 1:
        part = Part(scales)
    elif len(found) == 2 and found[0] > 1:
        part = Part(scales, 0, Fraction(block[0]))
    parts = {"weight": Part(key), "scale": part}
    if zero is not None:
        parts["zero"] = Part(zero, part.axis, part.rows)
    is_mx = files.headers[scales].dtype in _EXPONENTS
    kind = "MXFP4" if is_fp4 else "MXFP8" if is_mx else "FP8" if dtype.startswith("F8_") else "int8"
    unpack = partial(_unpack, block=block, is_mx=is_mx, is_fp4=is_fp4, is_divided=is_divided)
    encoder = _encoder(dtype, shape, block, is_mx, is_fp4, is_divided)
    words = kind + groups_in_words(found, shape, block)
    return files.packed(name or key, shape, parts, unpack, words, encoder=encoder)


def _encoder(
    dtype: str, shape: tuple[int, ...], block: tuple[int, int], is_mx: bool, is_fp4: bool, is_divided: bool
) -> Encoder | None:
    units = partial(_units, columns=shape[-1], block=block, is_mx=is_mx, is_divided=is_divided)
    if is_fp4 and dtype != "F4":  # of which a header counts values, and a tensor holds pairs
        return Encoder(FP4_LEVELS, units, _store_pairs)
    if dtype == "I8":
        return Encoder(tuple(range(-128, 128)), units, lambda levels, parts: {"weight": levels.to(torch.int8)})
    if (kind := _FP8.get(dtype)) is None:
        return None
    return Encoder(fp8_levels(kind), units, lambda levels, parts: {"weight": levels.to(kind)})


def _fitting(
    files: Files, key: str, shape: tuple[int, ...], found: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and columns of a block, of which the last may be cut off."""
    rows, columns = shape[-2:]
    if math.prod(found) in (1, shape[0] if len(shape) == 3 else 1) or len(found) == 1:
        fits = math.prod(found) in (1, shape[0])
        down, across = (1 if len(shape) == 3 or math.prod(found) == 1 else rows), 1
    else:
        fits = len(found) == len(shape) and found[:-2] in (shape[:-2], (1,) * (len(shape) - 2))
        down, across = found[-2:]
    if fits and block and (down, across) == (-(-rows // block[0]), -(-columns // block[1])):
        return block
    if fits and not block and rows % down == 0 and columns % across == 0:
        return (rows // down, columns // across)
    raise files.wrong(key, f"its scales are {'×'.join(map(str, found))}, the weight {'×'.join(map(str, shape))}")


def groups_in_words(found: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int]) -> str:
    """What shares a scale."""
    if math.prod(found) <= 1:
        return ", one scale"
    if block[0] not in (1, shape[-2]) or (block[0] > 1 and block[1] < shape[-1]):
        return f", blocks of {block[0]}×{block[1]}"
    return ", a scale a row" if block[1] >= shape[-1] else f", groups of {block[1]}"


def _store_pairs(levels: Tensor, parts: Tensors) -> dict[str, Tensor]:
    return {"weight": pairs(fp4_codes(levels)).view(parts["weight"].dtype)}


def _units(
    parts: Tensors, *, columns: int, block: tuple[int, int], is_mx: bool, is_divided: bool
) -> tuple[Tensor, Tensor | None]:
    stored = parts["weight"]
    rows = stored.shape[-2]
    spread = [
        grid(_of_stack(part, stored), rows, columns, block)
        for part in (powers(parts["scale"]) if is_mx else parts["scale"].float(), parts.get("zero"))
        if part is not None
    ]
    if is_divided:
        spread[0] = spread[0].reciprocal()
    return spread[0], -spread[1] * spread[0] if len(spread) > 1 else None


def _unpack(parts: Tensors, *, block: tuple[int, int], is_mx: bool, is_fp4: bool, is_divided: bool = False) -> Tensor:
    stored = parts["weight"]
    weight = fp4(stored) if is_fp4 else stored.float()
    rows, columns = weight.shape[-2:]
    if "zero" in parts:
        weight -= grid(_of_stack(parts["zero"], weight), rows, columns, block)
    scale = powers(parts["scale"]) if is_mx else parts["scale"]
    spread = grid(_of_stack(scale, weight), rows, columns, block)
    return weight / spread if is_divided else weight * spread


def _of_stack(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale an expert as [E, 1, 1]; blocks as [row blocks, column blocks]."""
    if scale.dim() == 4:
        return scale[:, 0, :, 0]
    is_short = weight.dim() == 3 and scale.dim() < 3 and scale.numel() == len(weight)
    return scale.reshape(-1, 1, 1) if is_short else scale
