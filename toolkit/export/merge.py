"""Merges an adapter into the original checkpoint, in its own keys, files and dtypes, one expert at a time.

`merge_and_unload` wants the whole model in memory and saves in transformers' layout. Here each file is copied, and only
the bytes of tensors that the adapter changes are written again, so that everything else stays the same bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from toolkit.adapters.layouts import Factors, deltas
from toolkit.checkpoint.conversion import Shards, targets
from toolkit.checkpoint.files import beside, headers_in
from toolkit.errors import ModelError
from toolkit.export.dequantised import merge_dequantised
from toolkit.quant.load import read_config, storage
from toolkit.quant.source import SourceWeights
from toolkit.steps import advance

__all__ = ["merge_checkpoint", "merged_difference", "overwrite"]


def merge_checkpoint(base: Path, adapter: Sequence[Factors], skeleton: PreTrainedModel, folder: Path) -> int:
    """Write the merged checkpoint into an empty folder; returns how many tensors changed.

    Raises:
        ModelError: the base holds onecard's int8 weights, or no tensor for a part that the adapter changes.
    """
    wanted = storage(str(base), read_config(str(base)))
    if wanted is None:
        raise ModelError(
            f"{base}: holds rounded int8 weights alone, and a merge starts from the original ones: give the checkpoint "
            "it was made from with --base FOLDER"
        )
    if wanted.source is not None:
        return merge_dequantised(base, adapter, skeleton, folder, beside(base))
    with Shards(str(base), base) as shards:
        names = targets(skeleton, get_model_conversion_mapping(skeleton), shards.keys)
        _copy(base, [path.name for path in shards.files], folder)
    places = headers_in(folder)
    changed = 0
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("r+b")) for path in {place.path for place in places.values()}}
        originals = {path: stack.enter_context(safe_open(base / path.name, framework="pt")) for path in files}
        for number, factors in enumerate(adapter, 1):
            group = [key for key, target in names.items() if target == factors.parameter]
            for key, delta in deltas(factors, skeleton):
                stored = _key(key, group, factors.parameter)
                place = places[stored]
                _add(files[place.path], place.offset, originals[place.path].get_tensor(stored), delta, stored)
                changed += 1
            advance(number, 2 * len(adapter), "tensors")
    return changed


def merged_difference(base: Path, merged: Path, adapter: Sequence[Factors]) -> tuple[float, float]:
    """Read the merge back through transformers' own loading and compare it with original plus adapter.

    Returns:
        The largest difference, and the largest one as a multiple of the dtype's rounding (at most 1 is exact).
    """
    before, after = SourceWeights(str(base)), SourceWeights(str(merged))
    worst, steps = 0.0, 0.0
    for number, factors in enumerate(adapter, 1):
        module = factors.parameter.rpartition(".")[0]
        with before.layer(module) as old, after.layer(module) as new:
            original, found = old[factors.parameter], new[factors.parameter]
            wanted = original.float() + factors.full()
            off = (found.float() - wanted).abs()
            worst = max(worst, float(off.max()))
            stored = after.stored_dtype(factors.parameter)  # beside tensors of another dtype it is read into that
            rounding = wanted.abs() * torch.finfo(stored).eps / 2 + torch.finfo(torch.float32).eps
            steps = max(steps, float((off / rounding).max()))
        advance(len(adapter) + number, 2 * len(adapter), "tensors")
    return worst, steps


def overwrite(file: BinaryIO, offset: int, tensor: Tensor) -> None:
    """Write a tensor's bytes over those at `offset`; its dtype and shape must be of the tensor that is there.

    safetensors itself writes whole files only.
    """
    file.seek(offset)
    file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def _copy(base: Path, shards: Sequence[str], folder: Path) -> None:
    for name in sorted({*(path.name for path in beside(base)), *shards}):
        shutil.copyfile(base / name, folder / name)


def _key(key: str, group: Sequence[str], parameter: str) -> str:
    """The checkpoint's own spelling, where it has another prefix or an older name than transformers would write."""
    if key in group:
        return key
    near = [name for name in group if name.endswith(f".{key}") or key.endswith(f".{name}")]
    if len(group) == 1 or len(near) == 1:
        return near[0] if near else group[0]
    raise ModelError(f"{parameter}: the checkpoint has no {key} that the adapter could be merged into")


def _add(file: BinaryIO, offset: int, original: Tensor, delta: Tensor, key: str) -> None:
    if original.shape != delta.shape or not original.is_floating_point():
        raise ModelError(f"{key}: {tuple(original.shape)} in the checkpoint, {tuple(delta.shape)} in the adapter")
    overwrite(file, offset, (original.float() + delta).to(original.dtype))
