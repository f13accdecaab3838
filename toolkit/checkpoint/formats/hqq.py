"""HQQ: codes of a weight cut into groups, packed by far apart rows, with a scale and a zero point in floats each.

The weight is a matrix of its groups, one a row (axis 1) or one a column (axis 0). A byte holds one row of each half
of that matrix, of each quarter or of each eighth; a 32-bit word of 3-bit codes holds one row of each tenth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from toolkit.checkpoint.formats.bits import as_bytes
from toolkit.checkpoint.formats.packed import FLOATS, Files, Packed, Part, Tensors

__all__ = ["BESIDE_HQQ", "read_hqq"]

_PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
"""Bits of a code and codes a word."""
_FLOATS = {"BF16": 2, "F16": 2, "F32": 4}
"""What words may be stored as (`view_as_float`), by bytes."""
BESIDE_HQQ = (
    *("shape", "nbits", "group_size", "axis", "packing", "channel_wise", "optimize", "round_zero", "quant_zero"),
    *("quant_scale", "offload_meta", "view_as_float", "encoded_state_dict", "stores_quant_config", "compute_dtype"),
    "unpack_view_dtype",
)
"""Tensors beside `W_q`, `scale` and `zero`, which say how these are to be read."""


def read_hqq(files: Files) -> Iterator[Packed]:
    """Every weight with a `W_q`.

    Raises:
        ModelError: an unknown packing, scales that are quantised too, or parts that do not fit together.
    """
    for module in files.modules("W_q"):
        key, told = f"{module}.W_q", f"{module}.packing"
        files.shape(told)
        packing = bytes(files.value(told).flatten().to(torch.uint8).tolist()[:16]).decode("latin-1")
        if packing not in _PACKINGS:
            raise files.wrong(key, f"packed as {packing!r}, which is not read")
        if f"{module}.scale" not in files.headers and _number(files, f"{module}.quant_scale"):
            raise files.wrong(key, "its scales are quantised too, which is not read")
        bits, many = _PACKINGS[packing]
        shape, axis = _shape(files, module), _number(files, f"{module}.axis")
        scale = files.matrix(f"{module}.scale")
        groups = math.prod(scale)
        size = math.prod(shape) // max(1, groups)
        rows, columns = (groups, size) if axis == 1 else (size, groups)
        fits = scale == ((groups, 1) if axis == 1 else (1, groups)) == files.shape(f"{module}.zero")
        if axis not in (0, 1) or not fits or rows * columns != math.prod(shape):
            raise files.wrong(key, f"{'×'.join(map(str, shape))} in {groups} groups do not fit along axis {axis}")
        stored, words = files.matrix(key), 4 if many == 10 else 1
        files.check_dtype(key, "I32" if many == 10 else "U8", *FLOATS)
        for part in ("scale", "zero"):
            files.check_dtype(f"{module}.{part}", *FLOATS)
        width = stored[1] * _FLOATS.get(files.headers[key].dtype, words)
        if (stored[0], width) != (-(-rows // many), columns * words):
            raise files.wrong(key, f"{stored[0]}×{stored[1]} does not hold {rows}×{columns} codes as {packing}")
        parts = {"codes": Part(key, None), "scale": Part(f"{module}.scale", None), "zero": Part(f"{module}.zero", None)}
        unpack = partial(_unpack, shape=shape, bits=bits, many=many, rows=rows)
        yield files.packed(f"{module}.weight", shape, parts, unpack, f"int{bits}, groups of {size}")


def _shape(files: Files, module: str) -> tuple[int, int]:
    key = f"{module}.shape"
    files.check_dtype(key, "I32", "I64")
    if files.shape(key) != (2,):
        raise files.wrong(key, "does not name two sizes")
    rows, columns = (int(size) for size in files.value(key))
    if min(rows, columns) < 1:
        raise files.wrong(key, f"says {rows}×{columns}")
    return rows, columns


def _number(files: Files, key: str) -> int:
    files.check_one(key, "U8", "I32", "I64")
    return int(files.value(key))


def _unpack(parts: Tensors, *, shape: tuple[int, int], bits: int, many: int, rows: int) -> Tensor:
    words = as_bytes(parts["codes"])
    words = words.view(torch.int32) if many == 10 else words
    codes = torch.cat([(words >> (bits * (many - 1 - number))) & (2**bits - 1) for number in range(many)])[:rows]
    return ((codes.float() - parts["zero"].float()) * parts["scale"].float()).reshape(shape)
