"""Writes an adapter into a quantised checkpoint in that checkpoint's own format: whoever loads the source loads this.

Each file is copied, and only the parts that hold codes of weights which the adapter changes are written again, at their
place: keys, dtypes, shapes, scales and zero points stay. Quantisers' own packages start from whole models in 16 bit,
choose new scales, and write other keys.

What an adapter adds is mostly less than half a step, so that the nearest code is the one that is there already. Here a
value between two codes takes the upper one as often as it is near to it: the mean over many weights is then right, and
with it their outputs. Chances are drawn from a weight's name, so that the same merge gives the same bytes. New scales
hardly helped, and handing errors on, so that the adapter's inputs A see none, kept no more for far more work.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from toolkit.adapters.layouts import Factors, deltas
from toolkit.checkpoint.config import quantised_as, read_config
from toolkit.checkpoint.conversion import targets
from toolkit.checkpoint.files import GGUF, METHOD, Placed, declared_format, headers_in
from toolkit.checkpoint.formats.bits import as_bytes
from toolkit.checkpoint.stacks import plain_weights
from toolkit.checkpoint.weights import PackedSlice, StackSlice
from toolkit.errors import ModelError
from toolkit.export.merge import copied, key_in_files
from toolkit.quant.ours import own_weights
from toolkit.steps import advance

__all__ = ["Homes", "merge_into_source"]

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Homes:
    """Where the weights that an adapter changes lie in a quantised checkpoint; nothing is read or written yet.

    Raises:
        ModelError: weights that are not quantised, or in a format that has no encoder.
    """

    def __init__(self, base: Path, adapter: Sequence[Factors], skeleton: PreTrainedModel) -> None:
        self.base, self._skeleton = base, skeleton
        kind = quantised_as(base) or "floats"
        if kind in (GGUF, "floats"):
            raise ModelError(f"{base}: its weights are {kind}, which merged-source does not write; {_INSTEAD[kind]}")
        self._weights: dict[str, Any]
        self._is_ours = kind == METHOD
        if self._is_ours:
            self._weights = dict(own_weights(base, skeleton))
            self._names = {key: key for key in self._weights}
        else:
            declared = declared_format(str(base), read_config(str(base)))
            self._weights = plain_weights(str(base), base, declared, skeleton, keyed=True)
            self._names = targets(skeleton, get_model_conversion_mapping(skeleton), self._weights)
        for factors in adapter:
            for piece in self._pieces(factors):
                if not isinstance(piece, PackedSlice):  # put together from what another layout holds apart
                    said = f"{factors.parameter} is not stored as one weight by {kind}"
                    raise ModelError(f"{base}: {said}, which merged-source does not write; {_INSTEAD['other']}")
                if piece.packed.encoder is None and piece.packed.stored not in _FLOATS:
                    stored = f"{piece.packed.name} is stored as {piece.packed.stored} by {kind}"
                    raise ModelError(f"{base}: {stored}, which merged-source does not write; {_INSTEAD['other']}")

    def of(self, factors: Factors) -> Iterator[tuple[PackedSlice, Tensor]]:
        """The weights that make up one parameter, each with what the adapter adds to it, fp32 in its shape."""
        keys = self._keys(factors)
        stack = self._weights[keys[0]]
        if isinstance(stack, StackSlice):
            for expert in range(len(factors.A_ERI)):
                for piece, part in stack.taken_apart(expert, factors.update(expert)):
                    yield piece, part.reshape(piece.shape)
            return
        if self._is_ours:
            yield stack, factors.full()
            return
        for key, delta, first in deltas(factors, self._skeleton):
            if first is not None:
                raise ModelError(
                    f"{factors.parameter}: the checkpoint stores it together with others: export as merged"
                )
            yield self._weights[key_in_files(key, keys, factors.parameter)], delta

    def _keys(self, factors: Factors) -> list[str]:
        found = [key for key, target in self._names.items() if target == factors.parameter]
        if not found:
            raise ModelError(f"{self.base}: holds no {factors.parameter} that the adapter could be merged into")
        return found

    def _pieces(self, factors: Factors) -> Iterator[Any]:
        for key in self._keys(factors):
            whole = self._weights[key]
            if isinstance(whole, StackSlice):
                yield from (piece for expert in range(whole.shape[0]) for piece in whole.pieces(expert))
            else:
                yield whole


_INSTEAD = {
    "floats": "export it as merged",
    GGUF: "export it as merged, or as gguf for llama.cpp",
    "other": "export it as merged",
}


def merge_into_source(homes: Homes, adapter: Sequence[Factors], folder: Path) -> int:
    """Write the merged checkpoint, in its source's format, into an empty folder; returns how many weights changed."""
    copied(homes.base, folder)
    places, changed = headers_in(folder), 0
    for number, factors in enumerate(adapter, 1):
        for weight, delta in homes.of(factors):
            _rewrite(weight, delta, places)
            changed += 1
        advance(number, len(adapter), "tensors")
    return changed


def _rewrite(weight: PackedSlice, delta: Tensor, places: Mapping[str, Placed]) -> None:
    """The codes of one weight, a block of rows after the other."""
    packed, start = weight.packed, None
    for begin, end, parts in weight.blocks():
        start = begin if start is None else start
        values = packed.unpack(parts).float() + delta[begin - start : end - start]
        if packed.encoder is None:
            new = {name: values.to(part.dtype) for name, part in parts.items()}
        else:
            drawn = torch.Generator().manual_seed(zlib.crc32(f"{packed.name} {begin}".encode()))
            new = packed.encoder.encode(values, parts, torch.rand(values.shape, generator=drawn))
        for name, axis, first, last in packed.spans(begin, end):
            if name in new:
                _overwrite(places[packed.parts[name].key], axis or 0, first, last, new[name])


def _overwrite(place: Placed, axis: int, first: int, last: int, tensor: Tensor) -> None:
    """Write `first` to `last` along an axis of a tensor in a file; safetensors itself writes whole files only."""
    size = place.bytes // math.prod(place.shape)
    mapped = np.memmap(place.path, np.uint8, "r+", place.offset, (*place.shape, size))
    found = torch.from_numpy(mapped)
    there = found.narrow(axis, first, min(last, place.shape[axis]) - first)
    there.copy_(as_bytes(tensor).unflatten(-1, (-1, size)))
    mapped.flush()
