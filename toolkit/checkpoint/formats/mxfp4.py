"""gpt-oss' own MXFP4: stacks as `_blocks` of 32 values and their `_scales`, transposed against the plain ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from toolkit.checkpoint.formats.bits import FP4_LEVELS, fp4, fp4_codes, nibbles, pairs, powers
from toolkit.checkpoint.formats.packed import Encoder, Files, FourBit, Packed, Part, Tensors

__all__ = ["read_mxfp4"]

_GROUP = 32


def read_mxfp4(files: Files) -> Iterator[Packed]:
    """Every stack [E, inputs, outputs], stored as [E, outputs, groups, 16] bytes.

    Raises:
        ModelError: blocks without their scales, or of another shape.
    """
    for key in files.headers:
        if not key.endswith("_blocks"):
            continue
        name = key.removesuffix("_blocks")
        blocks, scales = files.shape(key), files.shape(f"{name}_scales")
        for part in (key, f"{name}_scales"):
            files.check_dtype(part, "U8", "F8_E8M0")
        if len(blocks) != 4 or blocks[3] != _GROUP // 2 or scales != blocks[:3]:
            raise files.wrong(key, f"{'×'.join(map(str, blocks))} does not fit its scales")
        shape = (blocks[0], blocks[2] * _GROUP, blocks[1])
        parts = {"blocks": Part(key), "scales": Part(f"{name}_scales")}
        kept = FourBit("mxfp4", _GROUP, _codes)
        yield files.packed(name, shape, parts, _unpack, f"MXFP4, groups of {_GROUP}", kept, _ENCODER)


def _codes(parts: Tensors) -> tuple[Tensor, Tensor]:
    return nibbles(parts["blocks"]).flatten(2), parts["scales"].view(torch.uint8)


def _unpack(parts: Tensors) -> Tensor:
    return (fp4(parts["blocks"]) * powers(parts["scales"])[..., None]).flatten(2).transpose(1, 2)


def _units(parts: Tensors) -> tuple[Tensor, None]:
    return powers(parts["scales"]).repeat_interleave(_GROUP, -1).transpose(1, 2), None


def _store(levels: Tensor, parts: Tensors) -> dict[str, Tensor]:
    return {"blocks": pairs(fp4_codes(levels.transpose(1, 2))).unflatten(-1, (-1, _GROUP // 2))}


_ENCODER = Encoder(FP4_LEVELS, _units, _store)
