"""GPTQ and AWQ, auto-round's files too: `qweight`, `qzeros` and `scales`, whose shapes say bits, groups and layout.

So overrides by module (`dynamic`, `extra_config`) need not be read: what is not quantised has no such tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toolkit.checkpoint.formats.bits import fields, nibbles, pairs, planes, words
from toolkit.checkpoint.formats.packed import FLOATS, Encoder, Files, FourBit, Packed, Part, Tensors

__all__ = ["read_gptq"]

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the codes of eight outputs stand in a word of AWQ."""
_BORROWED = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""One in each code of a word: GPTQ's first format took it from the word as a whole, so borrows cross the codes."""

_LAYOUTS = ("gptq", "gptq_v2", "gptq_p")
"""`checkpoint_format` of what is read."""
_CODES = tuple(range(16))
"""Of AWQ."""
_TRUE_ZEROS = ("auto_round", "auto_round:gptqmodel")
"""auto-round's forms that store zero points as they are; its codes of 5 to 7 bits are never in planes."""


def read_gptq(files: Files) -> Iterator[Packed]:
    """Every weight with a `qweight`.

    Raises:
        ModelError: its parts do not fit together.
    """
    version = str(files.declared.get("version") or "").lower()
    for module in files.modules("qweight"):
        dtype = files.headers[f"{module}.qweight"].dtype
        if dtype == "I16":
            yield _gemv_fast(files, module)
            continue
        if dtype not in ("I32", "U32"):
            raise files.wrong(f"{module}.qweight", f"packed in {dtype}, which no known layout does")
        files.check_dtype(f"{module}.qzeros", "I32", "U32")
        files.check_dtype(f"{module}.scales", *FLOATS)
        across, scales = files.matrix(f"{module}.qweight")[1], files.matrix(f"{module}.scales")
        if "gemv" in version:
            yield _gemv(files, module)
        elif across == scales[1]:
            yield _gptq(files, module)
        elif across * 8 == scales[1]:
            yield _gemm(files, module)
        else:
            raise files.wrong(f"{module}.qweight", f"{across} columns do not fit {scales[1]} columns of scales")


def _gptq(files: Files, module: str) -> Packed:
    keys = {name: f"{module}.{name}" for name in ("qweight", "qzeros", "scales")}
    height, outputs = files.matrix(keys["qweight"])
    groups = files.shape(keys["scales"])[0]
    zeros = files.matrix(keys["qzeros"])
    fitting = [bits for bits in range(2, 9) if zeros == (groups, -(-outputs * bits // 32)) and height * 32 % bits == 0]
    if (order := files.headers.get(f"{module}.g_idx")) is not None:
        fitting = [bits for bits in fitting if order.shape == (height * 32 // bits,)]
    if not fitting:
        raise files.wrong(keys["qzeros"], f"is {'×'.join(map(str, zeros))} for {outputs} outputs in {groups} groups")
    bits = _bits(files, keys["qweight"], fitting)
    inputs = height * 32 // bits
    size = _group_size(files, module, inputs, groups)
    # A word of zeros holds some outputs' codes; by planes, or where codes cross words, 32 outputs lie in `bits` words.
    step = Fraction(32 // bits) if 32 % bits == 0 else Fraction(32, bits)
    told = str(files.declared.get("checkpoint_format") or "gptq").lower()
    if told not in _LAYOUTS:
        raise files.not_read(keys["qweight"], f"stored as {told[:80]!r}")
    is_first = told == "gptq" and files.declared.get("packing_format") not in _TRUE_ZEROS
    is_planar = told == "gptq_p" or (bits in (5, 6, 7) and not _is_auto_round(files))
    if is_planar and 32 % bits and (inputs % 32 or outputs % 32):
        raise files.wrong(keys["qweight"], f"{outputs}×{inputs} codes of {bits} bits fill no planes of 32")
    parts = {
        "codes": Part(keys["qweight"], 1),
        "zeros": Part(keys["qzeros"], 1, step, 32 if is_planar else 1),
        "scales": Part(keys["scales"], 1),
    }
    if order is not None:
        parts["order"] = Part(f"{module}.g_idx", None)
        files.check_order(f"{module}.g_idx", inputs, groups)
    elif files.declared.get("desc_act") is True:
        raise files.wrong(f"{module}.g_idx", "is not there, though desc_act says that the inputs are out of order")
    laid_out: dict[str, Any] = {"bits": bits, "size": size, "is_planar": is_planar, "is_first": is_first}
    unpack, kept, encoder = partial(_unpack_gptq, **laid_out), None, None
    if not is_planar:
        units = partial(_gptq_units, inputs=inputs, **laid_out)
        encoder = Encoder(tuple(range(2**bits)), units, partial(_store_gptq, bits=bits))
    if bits == 4 and inputs % groups == 0 and _is_symmetric(files, module, is_first, size):
        kept = FourBit("grouped", size, _codes, files.headers[keys["scales"]].dtype)
    stored = f"int{bits}, groups of {size}"
    return files.packed(f"{module}.weight", (outputs, inputs), parts, unpack, stored, kept, encoder)


def _bits(files: Files, key: str, fitting: list[int]) -> int:
    """Of a code: as the config says for all modules, or, where it has others for some, as the shapes allow."""
    bits = files.declared.get("bits")
    if bits in fitting:
        return int(bits)
    if isinstance(bits, int) and not files.declared.get("dynamic") and not files.declared.get("extra_config"):
        raise files.wrong(key, f"is no weight of the {bits} bits that the quantization_config says")
    return fitting[0]


def _is_auto_round(files: Files) -> bool:
    told = files.declared
    return "auto-round" in str(told.get("quant_method")) or told.get("provider") == "auto-round"


def _is_symmetric(files: Files, module: str, is_first: bool, size: int) -> bool:
    """Whether every zero point is 8 and inputs are in order, so that a weight is (code − 8) · scale."""
    zeros = files.value(f"{module}.qzeros").view(torch.uint8)
    wanted = 0x77 if is_first else 0x88
    if not bool((zeros == wanted).all()):
        return False
    order = f"{module}.g_idx"
    if order not in files.headers:
        return True
    found = files.value(order)
    return bool((found == torch.arange(len(found)) // size).all())


def _codes(parts: Tensors) -> tuple[Tensor, Tensor]:
    return nibbles(parts["codes"].T.contiguous()), parts["scales"].T


def _group_size(files: Files, module: str, inputs: int, groups: int) -> int:
    """Inputs of a group, of which the last may be cut off; where inputs are in order, nothing in the files says it.

    Raises:
        ModelError: no size that the config says makes so many groups, and they are not all alike.
    """
    for told in (*_own_sizes(files, module), files.declared.get("group_size")):
        if isinstance(told, int) and told > 0 and -(-inputs // told) == groups:
            return min(told, inputs)
    if inputs % groups and f"{module}.g_idx" not in files.headers:
        raise files.wrong(f"{module}.scales", f"no group_size makes {groups} groups of {inputs} inputs")
    return -(-inputs // groups)


def _own_sizes(files: Files, module: str) -> Iterator[object]:
    """What auto-round's config says of a module alone: under its name, then under patterns that it fits."""
    more = files.declared.get("extra_config")
    told = more if isinstance(more, Mapping) else {}
    for is_name in (True, False):
        for name, own in told.items():
            if isinstance(own, Mapping) and (name == module) == is_name and (is_name or _fits(name, module)):
                yield own.get("group_size")


def _fits(pattern: str, module: str) -> bool:
    try:
        return re.search(pattern, module) is not None
    except re.error:
        return False


def _unpack_gptq(parts: Tensors, *, bits: int, size: int, is_planar: bool, is_first: bool) -> Tensor:
    stored = parts["codes"].T.contiguous()
    codes = planes(stored, bits) if is_planar else fields(stored, bits, stored.shape[1] * 32 // bits)
    scale, shift = _scale_and_zero(parts, codes.shape[1], bits, size, is_planar=is_planar, is_first=is_first)
    return (codes.float() - shift) * scale


def _scale_and_zero(
    parts: Tensors, inputs: int, bits: int, size: int, *, is_planar: bool, is_first: bool
) -> tuple[Tensor, Tensor]:
    """Both [outputs, inputs] in fp32."""
    outputs, zeros = parts["codes"].shape[1], parts["zeros"].contiguous()
    if is_planar:
        zero = planes(zeros, bits)
    else:
        if is_first and bits in _BORROWED:
            zeros = ((zeros.long() + _BORROWED[bits]) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
        zero = fields(zeros, bits, outputs)
    if is_first and bits not in _BORROWED:
        zero = (zero + 1) & (2**bits - 1)
    order = parts["order"].long() if "order" in parts else torch.arange(inputs, device=zeros.device) // size
    return parts["scales"].float().T[:, order], zero[:, :outputs].float().T[:, order]


def _gptq_units(parts: Tensors, **laid_out: Any) -> tuple[Tensor, Tensor]:
    scale, shift = _scale_and_zero(parts, **laid_out)
    return scale, -shift * scale


def _store_gptq(levels: Tensor, parts: Tensors, *, bits: int) -> dict[str, Tensor]:
    return {"codes": words(levels.to(torch.uint8), bits, parts["codes"].shape[0]).T}


def _gemm(files: Files, module: str) -> Packed:
    inputs, width = files.matrix(f"{module}.qweight")
    groups, outputs = files.shape(f"{module}.scales")
    if files.shape(f"{module}.qzeros") != (groups, width) or inputs % groups:
        raise files.wrong(f"{module}.qzeros", f"does not fit {inputs} inputs in {groups} groups")
    eight = Fraction(8)
    parts = {
        "codes": Part(f"{module}.qweight", 1, eight),
        "zeros": Part(f"{module}.qzeros", 1, eight),
        "scales": Part(f"{module}.scales", 1),
    }
    stored = f"int4, groups of {inputs // groups}"
    encoder = Encoder(_CODES, _gemm_units, _store_gemm)
    return files.packed(f"{module}.weight", (outputs, inputs), parts, _unpack_gemm, stored, None, encoder)


def _unpack_gemm(parts: Tensors) -> Tensor:
    scale, shift = _gemm_grid(parts)
    weight: Tensor = (_in_order(nibbles(parts["codes"])).float() - shift) * scale
    return weight.t()


def _gemm_grid(parts: Tensors) -> tuple[Tensor, Tensor]:
    """Scales and zero points, [inputs, outputs]."""
    zeros, scales = _in_order(nibbles(parts["zeros"])), parts["scales"].float()
    size = parts["codes"].shape[0] // scales.shape[0]
    return scales.repeat_interleave(size, 0), zeros.float().repeat_interleave(size, 0)


def _gemm_units(parts: Tensors) -> tuple[Tensor, Tensor]:
    scale, shift = _gemm_grid(parts)
    return scale.t(), (-shift * scale).t()


def _store_gemm(levels: Tensor, parts: Tensors) -> dict[str, Tensor]:
    back = sorted(range(8), key=_AWQ_ORDER.__getitem__)
    codes = levels.t().to(torch.uint8).unflatten(-1, (-1, 8))[..., back].flatten(-2)
    return {"codes": pairs(codes).view(torch.int32)}


def _in_order(codes: Tensor) -> Tensor:
    eight: Tensor = codes.unflatten(-1, (-1, 8))[..., list(_AWQ_ORDER)]
    return eight.flatten(-2)


def _gemv(files: Files, module: str) -> Packed:
    """Codes in order along the inputs; columns of scales and zeros are padded."""
    outputs, width = files.matrix(f"{module}.qweight")
    inputs, size = 8 * width, _declared_group(files, module, 8 * width)
    rows, padded = files.matrix(f"{module}.scales")
    if rows != outputs or padded * size < inputs or files.shape(f"{module}.qzeros") != (outputs, -(-padded // 8)):
        raise files.wrong(f"{module}.qzeros", f"does not fit {inputs} inputs in groups of {size}")
    parts = {name: Part(f"{module}.{key}") for name, key in _NAMES.items()}
    unpack = partial(_unpack_gemv, size=size)
    encoder = Encoder(_CODES, partial(_gemv_units, inputs=inputs, size=size), _store_gemv)
    stored = f"int4, groups of {size}"
    return files.packed(f"{module}.weight", (outputs, inputs), parts, unpack, stored, None, encoder)


_NAMES = {"codes": "qweight", "zeros": "qzeros", "scales": "scales"}


def _declared_group(files: Files, module: str, inputs: int) -> int:
    size = files.declared.get("group_size", files.declared.get("q_group_size"))
    if not isinstance(size, int) or size == 0 or size < -1:
        raise files.wrong(module, f"the quantization_config says a group_size of {size!r}")
    return inputs if size == -1 else min(size, inputs)


def _unpack_gemv(parts: Tensors, *, size: int) -> Tensor:
    codes, zeros = nibbles(parts["codes"]), nibbles(parts["zeros"])
    group = torch.arange(codes.shape[1], device=codes.device) // size
    return (codes.float() - zeros.float()[:, group]) * parts["scales"].float()[:, group]


def _gemv_units(parts: Tensors, *, inputs: int, size: int) -> tuple[Tensor, Tensor]:
    group = torch.arange(inputs, device=parts["codes"].device) // size
    scale = parts["scales"].float()[:, group]
    return scale, -nibbles(parts["zeros"]).float()[:, group] * scale


def _store_gemv(levels: Tensor, parts: Tensors) -> dict[str, Tensor]:
    return {"codes": pairs(levels.to(torch.uint8)).view(torch.int32)}


def _gemv_fast(files: Files, module: str) -> Packed:
    """Four outputs interleaved in 16-bit words; what is called zeros is −z·s, and both are transposed."""
    quarter, inputs = files.matrix(f"{module}.qweight")
    if inputs % 64:
        raise files.wrong(f"{module}.qweight", f"{inputs} inputs are no blocks of 64")
    outputs, size = 4 * quarter, _declared_group(files, module, inputs)
    for name in ("scales", "qzeros"):
        files.check_dtype(f"{module}.{name}", *FLOATS)
        found = files.shape(f"{module}.{name}")
        if len(found) != 2 or found[1] != outputs or found[0] * size < inputs:
            raise files.wrong(f"{module}.{name}", f"does not fit {outputs}×{inputs} in groups of {size}")
    parts = {
        "codes": Part(f"{module}.qweight", 0, Fraction(4)),
        "zeros": Part(f"{module}.qzeros", 1),
        "scales": Part(f"{module}.scales", 1),
    }
    unpack = partial(_unpack_gemv_fast, size=size)
    encoder = Encoder(_CODES, partial(_gemv_fast_units, inputs=inputs, size=size), _store_gemv_fast)
    stored = f"int4, groups of {size}"
    return files.packed(f"{module}.weight", (outputs, inputs), parts, unpack, stored, None, encoder)


def _unpack_gemv_fast(parts: Tensors, *, size: int) -> Tensor:
    """Blocks of 64 inputs by four outputs; in each 32 inputs pairs stand apart, and even before odd ones."""
    stored = parts["codes"]
    rows, inputs = 4 * stored.shape[0], stored.shape[1]
    by_row = nibbles(stored).reshape(-1, inputs // 64, 4, 64).transpose(1, 2).reshape(rows, inputs)
    pairs = by_row.reshape(rows, inputs // 32, 4, 2, 4).transpose(3, 4)
    codes = pairs.transpose(2, 3).reshape(rows, inputs)
    scale, shift = _gemv_fast_units(parts, inputs=inputs, size=size)
    return codes.float() * scale + shift


def _gemv_fast_units(parts: Tensors, *, inputs: int, size: int) -> tuple[Tensor, Tensor]:
    group = torch.arange(inputs, device=parts["codes"].device) // size
    return parts["scales"].float().T[:, group], parts["zeros"].float().T[:, group]


def _store_gemv_fast(levels: Tensor, parts: Tensors) -> dict[str, Tensor]:
    rows, inputs = levels.shape
    apart = levels.to(torch.uint8).reshape(rows, inputs // 32, 4, 4, 2).transpose(2, 3).transpose(3, 4)
    blocks = apart.reshape(rows // 4, 4, inputs // 64, 64).transpose(1, 2).reshape(rows // 4, 4 * inputs)
    return {"codes": pairs(blocks).view(torch.int16)}
