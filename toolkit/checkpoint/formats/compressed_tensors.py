"""compressed-tensors, which llm-compressor and vLLM write: integers packed or plain, FP8, NVFP4 and the MX formats.

A module has the scheme of the config group that names it exactly, by a pattern at the start of its name, or by its
class, in this order; of several patterns the first by text, as in the package. A scheme that the widths of the tensors
contradict is passed over. Which modules are quantised is read from the tensors, so one expert may be plain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toolkit.checkpoint.formats.bits import FP4_LEVELS, fields, fp4, fp4_codes, fp6, grid, nibbles, pairs, powers, words
from toolkit.checkpoint.formats.packed import FLOATS, Encoder, Files, FourBit, Packed, Part, Tensors
from toolkit.checkpoint.formats.scaled import scaled
from toolkit.errors import ModelError

__all__ = ["read_compressed_tensors"]

_MX_GROUP = 32
_NV_GROUP = 16
_DENSE_SINCE = [0, 18]
"""From this version on codes of odd widths are packed across words."""
_FORMATS = (
    *("", "dense", "mixed-precision", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"),
)
"""Names of what is read; of the others some are sparse, and one has FP4 with scales in a float of its own."""


def read_compressed_tensors(files: Files) -> Iterator[Packed]:
    """Every weight that is stored in parts.

    Raises:
        ModelError: no group says how a module is stored, an unknown format, or parts that do not fit together.
    """
    for module in files.modules("weight_packed"):
        yield _first_that_fits(files, module, _packed)
    for module in files.modules("weight_scale"):
        if f"{module}.weight" in files.headers:
            yield _first_that_fits(files, module, _scaled)


_Reader = Callable[[Files, str, Mapping[str, Any]], Packed]


def _first_that_fits(files: Files, module: str, read: _Reader) -> Packed:
    error: ModelError | None = None
    for scheme in _schemes(files, module):
        if scheme["format"] not in _FORMATS:
            raise files.not_read(module, f"stored as {scheme['format'][:80]}")
        try:
            return read(files, module, scheme)
        except ModelError as why:
            error = error or why
    raise error or files.wrong(module, "no group of the quantization_config names it")


def _schemes(files: Files, module: str) -> list[Mapping[str, Any]]:
    """The weights' arguments of every group that names a module, the one that counts first."""
    groups = files.declared.get("config_groups")
    if groups is None:  # auto-round's files in this form, which have no integers packed: shapes say it all
        return [{"format": ""}]
    found: dict[tuple[bool, bool, str], Mapping[str, Any]] = {}
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        targets = group.get("targets")
        for target in targets if isinstance(targets, list) else [targets]:
            if not isinstance(target, str):
                continue
            if target == module or _matches(target, module) or _is_class(target):
                stored = str(group.get("format") or files.declared.get("format") or "")
                found[_is_class(target), target.startswith("re:"), target] = {**weights, "format": stored}
    return [found[place] for place in sorted(found)]


def _matches(target: str, module: str) -> bool:
    try:
        return target.startswith("re:") and re.match(target[3:], module) is not None
    except re.error:
        return False


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target


def _packed(files: Files, module: str, scheme: Mapping[str, Any]) -> Packed:
    name, key = f"{module}.weight", f"{module}.weight_packed"
    parts = {"packed": Part(key), "scale": Part(f"{module}.weight_scale")}
    scale = files.shape(f"{module}.weight_scale")
    rows, width = files.matrix(key)
    dtype = files.headers[key].dtype
    if dtype == "I32":
        return _integers(files, module, scheme)
    if scale[:1] != (rows,):
        raise files.wrong(f"{module}.weight_scale", f"is {'×'.join(map(str, scale))} for {rows} rows")
    if f"{module}.weight_global_scale" in files.headers:
        if scale != (rows, 2 * width // _NV_GROUP):
            raise files.wrong(f"{module}.weight_scale", f"is {'×'.join(map(str, scale))} for {rows}×{2 * width} values")
        files.check_one(f"{module}.weight_global_scale", *FLOATS)
        parts["global"] = Part(f"{module}.weight_global_scale", None)
        return files.packed(name, (rows, 2 * width), parts, _nvfp4, f"NVFP4, groups of {_NV_GROUP}", None, _NVFP4)
    if dtype not in ("U8", "F8_E8M0", "F4") or len(scale) != 2:
        raise files.wrong(key, f"packed in {dtype}, which no known format does")
    columns = scale[1] * _MX_GROUP
    if width * 2 == columns:
        encoder = None if dtype == "F4" else _MXFP4
        kept = FourBit("mxfp4", _MX_GROUP, lambda parts: (nibbles(parts["packed"]), parts["scale"].view(torch.uint8)))
        return files.packed(name, (rows, columns), parts, _mxfp4, f"MXFP4, groups of {_MX_GROUP}", kept, encoder)
    if width * 8 == columns * 6:
        unpack = partial(_mxfp6, columns=columns)
        return files.packed(name, (rows, columns), parts, unpack, f"MXFP6, groups of {_MX_GROUP}")
    raise files.wrong(key, f"{rows}×{width} does not fit its {scale[0]}×{scale[1]} scales")


def _integers(files: Files, module: str, scheme: Mapping[str, Any]) -> Packed:
    key, bits, group = f"{module}.weight_packed", _number(scheme.get("num_bits")), _number(scheme.get("group_size"))
    if not 2 <= bits <= 8 or scheme.get("type") == "float":
        raise files.wrong(key, f"the quantization_config says {scheme.get('num_bits')!r} bits of {scheme.get('type')}")
    rows, words = files.matrix(key)
    scale = files.shape(f"{module}.weight_scale")
    columns = _columns(files, module, bits, words, scale, group)
    across = _runs_across(files, key, bits, words, columns)
    _check_scales(files, module, scheme, rows, columns)
    axis = 0 if len(scale) == 2 and scale[0] == rows else None
    parts = {"packed": Part(key), "scale": Part(f"{module}.weight_scale", axis)}
    zeros_across = across
    if (zero := f"{module}.weight_zero_point") in files.headers:
        parts["zero"] = Part(zero, axis)
        if files.headers[zero].dtype == "I32" and axis == 0:
            zeros_across = _runs_across(files, zero, bits, files.matrix(zero)[0], rows)
            if files.shape(zero)[1:] != scale[1:]:
                raise files.wrong(zero, "does not fit the scales beside it")
            parts["zero"] = Part(zero, 0, Fraction(32 // bits))
            if 32 % bits:  # codes of one row lie in two words, so that rows cannot be read by themselves
                parts = {name: Part(part.key, None) for name, part in parts.items()}
        elif files.shape(zero) != scale:
            raise files.wrong(zero, "does not fit the scales beside it")
    order = f"{module}.weight_g_idx"
    if scheme.get("actorder") in ("group", "dynamic") and files.shape(order) != (columns,):
        raise files.wrong(order, f"does not order {columns} inputs")
    if order in files.headers:
        files.check_dtype(order, "I32", "I64")
    if order in files.headers and int(files.value(order).max()) >= 0:
        files.check_order(order, columns, scale[-1])
        parts["group"] = Part(order, None)  # -1 where it was never filled
    laid_out: dict[str, Any] = {"bits": bits, "columns": columns, "group": group, "zeros_across": zeros_across}
    unpack = partial(_unpack_integers, across=across, **laid_out)
    half, kept = 2 ** (bits - 1), None
    store = partial(_store_integers, bits=bits, across=across)
    encoder = Encoder(tuple(range(-half, half)), partial(_integer_units, **laid_out), store)
    if bits == 4 and group > 0 and columns % group == 0 and parts.keys() == {"packed", "scale"}:
        kept = FourBit("grouped", group, _codes, files.headers[f"{module}.weight_scale"].dtype)
    stored = f"int{bits}{_groups(scale, group)}"
    return files.packed(f"{module}.weight", (rows, columns), parts, unpack, stored, kept, encoder)


def _check_scales(files: Files, module: str, scheme: Mapping[str, Any], rows: int, columns: int) -> None:
    """That there are as many scales as the scheme says, and zero points where it says that there are some."""
    scale, group = files.shape(f"{module}.weight_scale"), _number(scheme.get("group_size"))
    wanted: dict[str, list[tuple[int, ...]]] = {
        "tensor": [(), (1,), (1, 1)],
        "channel": [(rows,), (rows, 1)],
        "group": [(rows, -(-columns // max(1, group)))],
    }
    known = [shape for shapes in wanted.values() for shape in shapes]
    if scale not in wanted.get(str(scheme.get("strategy")), known):
        found = "×".join(map(str, scale))
        raise files.wrong(f"{module}.weight_scale", f"is {found}, which does not fit a weight of {rows}×{columns}")
    if scheme.get("symmetric") is False:
        files.shape(f"{module}.weight_zero_point")


def _codes(parts: Tensors) -> tuple[Tensor, Tensor]:
    """Symmetric int4: stored with 8 added, as a kept stack has it; columns that fill no word are padding."""
    scale = parts["scale"]
    return nibbles(parts["packed"]), scale


def _runs_across(files: Files, key: str, bits: int, words: int, count: int) -> bool:
    """Whether `words` words hold `count` codes as one stream of bits, not as whole codes in each word."""
    stream, whole = words == -(-count * bits // 32), words == -(-count // (32 // bits))
    if not stream and not whole:
        raise files.wrong(key, f"{words} words do not hold {count} values of {bits} bits")
    if stream and whole and 32 % bits:
        numbers = [int(part) for part in re.findall(r"\d+", str(files.declared.get("version") or ""))[:2]]
        return not numbers or numbers >= _DENSE_SINCE
    return stream


def _columns(files: Files, module: str, bits: int, words: int, scale: tuple[int, ...], group: int) -> int:
    """Inputs of a packed weight: as its shape tensor says, else as many as its groups or its words hold."""
    if (told := f"{module}.weight_shape") in files.headers and files.shape(told) == (2,):
        files.check_dtype(told, "I32", "I64")
        return max(0, int(files.value(told)[1]))
    if group > 0 and len(scale) == 2 and scale[1] > 1:
        return group * scale[1]
    return words * 32 // bits if 32 % bits == 0 else words * (32 // bits)


def _scaled(files: Files, module: str, scheme: Mapping[str, Any]) -> Packed:
    zero, block = f"{module}.weight_zero_point", _block(files, module, scheme)
    if scheme.get("strategy") in ("tensor", "channel", "group"):
        _check_scales(files, module, scheme, *files.matrix(f"{module}.weight"))
    has_zero = zero in files.headers
    return scaled(files, f"{module}.weight", f"{module}.weight_scale", block, zero if has_zero else None)


def _block(files: Files, key: str, scheme: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the scheme says so."""
    told = scheme.get("block_structure")
    if told is None:
        group = _number(scheme.get("group_size"))
        return (1, group) if group > 0 else None
    if isinstance(told, (list, tuple)) and len(told) == 2 and all(_number(size) > 0 for size in told):
        return (told[0], told[1])
    raise files.wrong(key, f"the quantization_config says blocks of {told!r}")


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _groups(scale: tuple[int, ...], group: int) -> str:
    if math.prod(scale) <= 1:
        return ", one scale"
    return f", groups of {group}" if group > 0 else ", a scale a row"


def _unpack_integers(
    parts: Tensors, *, bits: int, columns: int, group: int, across: bool, zeros_across: bool
) -> Tensor:
    """(q − z) · s; codes are stored with half their range added, zero points too."""
    codes: Tensor = fields(parts["packed"], bits, columns, across=across).float().sub_(2 ** (bits - 1))
    scale, zero = _scale_and_zero(parts, bits=bits, columns=columns, group=group, zeros_across=zeros_across)
    if zero is not None:
        codes.sub_(zero)
    return codes.mul_(scale)


def _scale_and_zero(
    parts: Tensors, *, bits: int, columns: int, group: int, zeros_across: bool
) -> tuple[Tensor, Tensor | None]:
    scale, zero, rows = parts["scale"].float(), parts.get("zero"), parts["packed"].shape[0]
    if zero is not None and zero.dtype == torch.int32:
        zero = fields(zero.T, bits, rows, across=zeros_across).T.float() - 2 ** (bits - 1)
    if "group" in parts:
        order = parts["group"].long()
        scale, zero, group = scale[:, order], zero if zero is None else zero[:, order], 1
    block = (1, group) if group > 0 else None
    return grid(scale, rows, columns, block), zero if zero is None else grid(zero, rows, columns, block)


def _integer_units(parts: Tensors, **laid_out: Any) -> tuple[Tensor, Tensor | None]:
    scale, zero = _scale_and_zero(parts, **laid_out)
    return scale, zero if zero is None else -zero * scale


def _store_integers(levels: Tensor, parts: Tensors, *, bits: int, across: bool) -> dict[str, Tensor]:
    codes = (levels + 2 ** (bits - 1)).to(torch.uint8)
    return {"packed": words(codes, bits, parts["packed"].shape[-1], across=across)}


def _nvfp4(parts: Tensors) -> Tensor:
    values = fp4(parts["packed"])
    scale = parts["scale"].float() / parts["global"].float().reshape(())
    return values * grid(scale, *values.shape)


def _mxfp4(parts: Tensors) -> Tensor:
    values = fp4(parts["packed"])
    return values * grid(powers(parts["scale"]), *values.shape)


def _mxfp6(parts: Tensors, *, columns: int) -> Tensor:
    values = fp6(fields(parts["packed"], 6, columns))
    return values * grid(powers(parts["scale"]), *values.shape)


def _store_floats(levels: Tensor, parts: Tensors) -> dict[str, Tensor]:
    return {"packed": pairs(fp4_codes(levels))}


def _nvfp4_units(parts: Tensors) -> tuple[Tensor, None]:
    scale = parts["scale"].float() / parts["global"].float().reshape(())
    return grid(scale, *_fp4_shape(parts)), None


def _mxfp4_units(parts: Tensors) -> tuple[Tensor, None]:
    return grid(powers(parts["scale"]), *_fp4_shape(parts)), None


def _fp4_shape(parts: Tensors) -> tuple[int, int]:
    rows, width = parts["packed"].shape
    return rows, 2 * width


_NVFP4 = Encoder(FP4_LEVELS, _nvfp4_units, _store_floats)
_MXFP4 = Encoder(FP4_LEVELS, _mxfp4_units, _store_floats)
