"""bitsandbytes: NF4 and FP4 in blocks over the flattened weight, their scales perhaps quantised again, and int8.

How a 4-bit weight is laid out stands as JSON in a small tensor beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any

from torch import Tensor

from toolkit.checkpoint.formats.bits import nibbles
from toolkit.checkpoint.formats.packed import FLOATS, Files, Packed, Part, Tensors
from toolkit.errors import first_line

__all__ = ["read_bitsandbytes"]

_STATE = ".quant_state.bitsandbytes__"
_UNIT = 7.874015718698502e-3
"""What an int8 code is worth at scale 1: 1/127 in fp32, by which bitsandbytes multiplies."""


def read_bitsandbytes(files: Files) -> Iterator[Packed]:
    """Every weight of 4 bits by its state, every one of 8 bits by its `SCB`.

    Raises:
        ModelError: a state that cannot be read, or parts that do not fit it.
    """
    for key in files.headers:
        weight, found, kind = key.partition(_STATE)
        if found:
            yield _four_bits(files, weight, kind, key)
    for module in files.modules("SCB"):
        weight = f"{module}.weight"
        rows, columns = files.matrix(weight)
        scales = files.shape(f"{module}.SCB")
        if files.headers[weight].dtype != "I8" or scales[:1] != (rows,) or math.prod(scales) != rows:
            raise files.wrong(weight, f"{rows} rows in {files.headers[weight].dtype} do not fit their scales")
        if (order := f"{module}.weight_format") in files.headers and int(files.value(order).flatten()[0]) != 0:
            raise files.not_read(order, "rows in the tiles of a card's kernel")
        parts = {"codes": Part(weight), "scale": Part(f"{module}.SCB")}
        yield files.packed(weight, (rows, columns), parts, _unpack_int8, "int8, a scale a row")


def _unpack_int8(parts: Tensors) -> Tensor:
    return parts["codes"].float() * parts["scale"].float().reshape(-1, 1) * _UNIT


def _four_bits(files: Files, weight: str, kind: str, key: str) -> Packed:
    state = _state(files, key)
    shape, block = state["shape"], state["blocksize"]
    stored, scales = files.shape(weight), files.shape(f"{weight}.absmax")
    row, whole = math.prod(shape[1:]), files.headers[weight].bytes
    spare = whole - -(-math.prod(shape) // 2)
    if not 0 <= spare < whole // math.prod(stored) or math.prod(scales) != -(-math.prod(shape) // block):
        raise files.wrong(weight, f"{whole} bytes do not hold {'×'.join(map(str, shape))}")
    parts = {
        "codes": Part(weight, 0, Fraction(2 * whole, row * max(1, math.prod(stored)))),
        "absmax": Part(f"{weight}.absmax", 0, Fraction(block, row)),
        "values": Part(f"{weight}.quant_map", None),
    }
    nested = {name: Part(f"{weight}.{name}", None) for name in ("nested_absmax", "nested_quant_map")}
    is_nested = state["nested_blocksize"] > 0
    _check_maps(files, weight, math.prod(scales), state["nested_blocksize"])
    if is_nested or row % block or max(stored) != math.prod(stored) or len(scales) != 1:
        parts = {name: Part(part.key, None) for name, part in parts.items()} | (nested if is_nested else {})
    unpack = partial(
        _unpack, row=shape[1:], block=block, offset=state["nested_offset"], nested_block=state["nested_blocksize"]
    )
    return files.packed(weight, shape, parts, unpack, f"{kind}, blocks of {block}{', scales in 8 bit' * is_nested}")


def _state(files: Files, key: str) -> dict[str, Any]:
    """What the JSON says, each value of its kind."""
    files.check_dtype(key, "U8")
    try:
        told = json.loads(bytes(files.value(key).flatten().tolist()))
        sizes = tuple(int(size) for size in told["shape"])
        blocks = int(told["blocksize"]), int(told.get("nested_blocksize", 0))
        if not sizes or min(*sizes, blocks[0]) < 1 or blocks[1] < 0:
            raise ValueError(f"it says {told}")
        offset = float(told.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise files.wrong(key, f"not a state of bitsandbytes ({first_line(error)[:120]})") from None
    return {"shape": sizes, "blocksize": blocks[0], "nested_blocksize": blocks[1], "nested_offset": offset}


def _check_maps(files: Files, weight: str, scales: int, nested_block: int) -> None:
    """That codes stand for so many values, and codes of scales too."""
    wanted = {"quant_map": 16}
    files.check_dtype(f"{weight}.absmax", *(["U8"] if nested_block else FLOATS))
    if nested_block:
        wanted |= {"nested_quant_map": 256, "nested_absmax": -(-scales // nested_block)}
    for name, count in wanted.items():
        if math.prod(files.shape(f"{weight}.{name}")) != count:
            raise files.wrong(f"{weight}.{name}", f"does not hold {count} values")
        files.check_dtype(f"{weight}.{name}", *FLOATS)


def _unpack(parts: Tensors, *, row: tuple[int, ...], block: int, offset: float, nested_block: int) -> Tensor:
    codes = nibbles(parts["codes"].flatten(), high_first=True)
    absmax = parts["absmax"]
    if absmax.dim() == 2:  # as a forward on a CPU leaves it
        absmax = absmax.T
    absmax = absmax.flatten()
    if "nested_absmax" in parts:
        nested = parts["nested_absmax"].flatten().repeat_interleave(nested_block)[: len(absmax)]
        absmax = parts["nested_quant_map"].float().flatten()[absmax.long()] * nested + offset
    count = len(codes) // math.prod(row) * math.prod(row)
    scales = absmax.float().repeat_interleave(block)[:count]
    return (parts["values"].float().flatten()[codes[:count].long()] * scales).reshape(-1, *row)
