"""Merges an adapter into the original checkpoint, in its own keys, files and dtypes, one expert at a time.

`merge_and_unload` wants the whole model in memory and saves in transformers' layout. Here each file is copied, and only
the bytes of tensors that the adapter changes are written again, so that everything else stays the same bit for bit.
Bytes of FP8 or MXFP4 cannot be added to in place: such a checkpoint becomes a plain bf16 one, layer by layer. Each is
multiplied out by transformers' own conversions and the adapter added in fp32, as if it had never been quantised.

A multi-token-prediction head that the base carries is written into the base's own tensors, which transformers'
`use_mtp` and servers read. A new head would be keys that no loader of that family knows; it becomes a draft folder of
its own, where servers have a block that can hold it. config.json says how many layers there are, 0 for none.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from toolkit.adapters.layouts import Factors, deltas
from toolkit.artifact.manifest import write_json
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.conversion import Shards, every_target
from toolkit.checkpoint.files import beside, gguf_at, headers_in, shards_of, write_index
from toolkit.checkpoint.gguf_source import opened
from toolkit.checkpoint.unused import unused
from toolkit.errors import ModelError
from toolkit.mtp.draft_folder import draft_config, draft_tensors
from toolkit.mtp.head_file import HEAD_FILE, config_with_head, merged_head_state, native_keys
from toolkit.quant.load import storage
from toolkit.quant.source import SourceWeights
from toolkit.steps import advance

__all__ = [
    "DRAFT_FOLDER",
    "Merged",
    "copied",
    "key_in_files",
    "left_beside",
    "merge_checkpoint",
    "merged_difference",
    "merged_parameters",
    "put_beside",
    "stitch_head",
]

_PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_QUANTIZED = "quantization_config"

DRAFT_FOLDER = "draft"


@dataclass(frozen=True)
class Merged:
    """How many tensors or parameters changed, and by name what the model does not use: kept beside it, or left out."""

    changed: int
    kept: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def merge_checkpoint(base: Path, adapter: Sequence[Factors], skeleton: PreTrainedModel, folder: Path) -> Merged:
    """Write the merged checkpoint into an empty folder.

    Raises:
        ModelError: the base holds onecard's int8 weights, or no tensor for a part that the adapter changes.
    """
    wanted = storage(str(base), read_config(str(base)))
    if wanted is None:
        raise ModelError(
            f"{base}: holds rounded int8 weights alone, and a merge starts from the original ones: give the checkpoint "
            "it was made from with --base FOLDER, or name it as model.merge_base; merged-source writes into int8"
        )
    if wanted.source is not None:
        return _merge_dequantised(base, adapter, skeleton, folder)
    with Shards(str(base), base) as shards:
        names = every_target(skeleton, get_model_conversion_mapping(skeleton), shards.keys)
    copied(base, folder)
    places = headers_in(folder)
    changed = 0
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("r+b")) for path in {place.path for place in places.values()}}
        originals = {path: stack.enter_context(safe_open(base / path.name, framework="pt")) for path in files}
        for number, factors in enumerate(adapter, 1):
            group = [key for key, reached in names.items() if factors.parameter in reached]
            for key, delta, first in deltas(factors, skeleton):
                stored = key_in_files(key, group, factors.parameter)
                place = places[stored]
                _add(files[place.path], place.offset, originals[place.path].get_tensor(stored), delta, stored, first)
                changed += 1
            advance(number, 2 * len(adapter), "tensors")
    beside_model, _ = unused({key: reached[0] for key, reached in names.items()}, skeleton.state_dict())
    return Merged(changed, tuple(key for keys in beside_model.values() for key in keys))


def merged_difference(base: Path, merged: Path, adapter: Sequence[Factors]) -> tuple[float, float]:
    """Read the merge back through transformers' own loading and compare it with original plus adapter.

    Returns:
        The largest difference, and the largest one as a multiple of the dtype's rounding (at most 1 is exact).
    """
    before, after = SourceWeights(str(base)), SourceWeights(str(merged))
    worst, steps, done = 0.0, 0.0, len(adapter)
    modules: dict[str, list[Factors]] = {}
    for factors in adapter:
        modules.setdefault(factors.parameter.rpartition(".")[0], []).append(factors)
    for module, there in modules.items():
        with before.layer(module) as old, after.layer(module) as new:
            for factors in there:
                name = factors.parameter
                off, rounded = _apart(old[name], new[name], factors, after.stored_dtype(name))
                worst, steps, done = max(worst, off), max(steps, rounded), done + 1
        advance(done, 2 * len(adapter), "tensors")
    return worst, steps


def _apart(original: Tensor, found: Tensor, factors: Factors, stored: torch.dtype) -> tuple[float, float]:
    """Of one parameter, an expert at a time. `stored`: its dtype in the files; beside others it is read into theirs."""
    worst, steps = 0.0, 0.0
    for expert in range(len(factors.A_ERI)):
        update = factors.update(expert)
        before, after = (tensor[expert] if factors.is_stack else tensor for tensor in (original, found))
        wanted = before.float() + (update.T if factors.is_transposed else update)
        off = (after.float() - wanted).abs()
        rounding = wanted.abs() * torch.finfo(stored).eps / 2 + torch.finfo(torch.float32).eps
        worst, steps = max(worst, float(off.max())), max(steps, float((off / rounding).max()))
    return worst, steps


def _overwrite(file: BinaryIO, offset: int, tensor: Tensor) -> None:
    """Write a tensor's bytes over those at `offset`; its dtype and shape must be of the tensor that is there.

    safetensors itself writes whole files only.
    """
    file.seek(offset)
    file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def copied(base: Path, folder: Path) -> None:
    """A checkpoint's weights and what belongs to it beside them, byte by byte into another folder."""
    for name in sorted({*(path.name for path in beside(base)), *shards_of(base)}):
        shutil.copyfile(base / name, folder / name)


def key_in_files(key: str, group: Sequence[str], parameter: str) -> str:
    """The checkpoint's own spelling, where it has another prefix or an older name than transformers would write."""
    if key in group:
        return key
    near = [name for name in group if name.endswith(f".{key}") or key.endswith(f".{name}")]
    if len(group) == 1 or len(near) == 1:
        return near[0] if near else group[0]
    raise ModelError(f"{parameter}: the checkpoint has no {key} that the adapter could be merged into")


def _add(file: BinaryIO, offset: int, original: Tensor, delta: Tensor, key: str, first: int | None) -> None:
    """`first` is the row from which on it is added; all of the tensor where it is None."""
    if first is not None:
        offset += first * original.shape[1] * original.element_size()
        original = original[first : first + len(delta)]
    if original.shape != delta.shape or not original.is_floating_point():
        raise ModelError(f"{key}: {tuple(original.shape)} in the checkpoint, {tuple(delta.shape)} in the adapter")
    _overwrite(file, offset, (original.float() + delta).to(original.dtype))


def _merge_dequantised(base: Path, adapter: Sequence[Factors], skeleton: PreTrainedModel, folder: Path) -> Merged:
    """Write the merged checkpoint in bf16 into an empty folder, a shard a layer.

    The files beside its weights come along; what says in config.json that it is quantised is left out. Tensors that
    were plain floats keep their dtype. What is no parameter of the model is kept too, under the names that it has.

    Raises:
        ModelError: the adapter changes a parameter that the checkpoint does not hold.
    """
    source = SourceWeights(str(base))
    by_parameter = {factors.parameter: factors for factors in adapter}
    parts, (beside_model, left_out) = source.parts(), source.unused()
    weight_map, sizes, changed, count = dict[str, str](), Counter[torch.dtype](), 0, len(parts) + len(beside_model)
    for number, (name, stored) in enumerate([*parts.items(), *beside_model.items()], 1):
        if number <= len(parts):
            with source.layer(name) as layer:
                changed += len(by_parameter.keys() & set(stored))
                merged = {
                    key: _merged(layer[key], by_parameter.pop(key, None), source.stored_as(key)) for key in stored
                }
                tensors = {key: part.contiguous() for key, part in revert_weight_conversion(skeleton, merged).items()}
        else:
            tensors = source.plain(key for key in stored if key not in weight_map)
        file = f"model-{number:05}-of-{count:05}.safetensors"
        save_file({key: tensors[key] for key in sorted(tensors)}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        for part in tensors.values():
            sizes[part.dtype] += part.nbytes
    if by_parameter:
        raise ModelError(f"{base}: holds no {min(by_parameter)} that the adapter could be merged into")
    put_beside(base, skeleton, folder, sizes.most_common(1)[0][0])
    write_index(folder, weight_map, sizes.total())
    drafts = opened(base).left_out if gguf_at(base) else ()
    return Merged(changed, tuple(key for keys in beside_model.values() for key in keys), (*left_out, *drafts))


def merged_parameters(source: SourceWeights, adapter: Sequence[Factors]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with the adapter added, by name, in fp32; what is no number of floats as it is.

    At most one layer's weights and one parameter in fp32 are alive.

    Raises:
        ModelError: the adapter changes a parameter that the checkpoint does not hold.
    """
    by_parameter = {factors.parameter: factors for factors in adapter}
    parts = source.parts()
    for number, (part, stored) in enumerate(parts.items(), 1):
        with source.layer(part) as layer:
            for name in stored:
                value = layer[name]
                value = value.float() if value.is_floating_point() else value
                if (factors := by_parameter.pop(name, None)) is not None:
                    value = value.clone() if value is layer[name] else value
                    factors.add_to(value)
                yield name, value
        advance(number, len(parts), "layers")
    if by_parameter:
        raise ModelError(f"{source.name}: holds no {min(by_parameter)} that the adapter could be merged into")


def put_beside(base: Path, skeleton: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """What belongs to a plain checkpoint beside its weights, most of which are of `dtype`."""
    if gguf_at(base):
        config = copy.deepcopy(skeleton.config)
        config.dtype = dtype  # the file does not say it
        config.save_pretrained(folder)
    else:
        for path in beside(base):
            shutil.copyfile(path, folder / path.name)
    _plain_config(folder / "config.json")


def _merged(original: Tensor, factors: Factors | None, stored: set[str]) -> Tensor:
    """In the dtype of its file where that was a plain one, otherwise in bf16."""
    if not original.is_floating_point():
        return original
    dtype = _PLAIN[min(stored)] if stored <= _PLAIN.keys() and len(stored) == 1 else torch.bfloat16
    return (original.float() if factors is None else original.float() + factors.full()).to(dtype)


def _plain_config(path: Path) -> None:
    """Text and multimodal configs declare it at the top or in the part of the text model."""
    config = _without(json.loads(path.read_bytes()))
    write_json(path, config)


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key != _QUANTIZED}
    return {key: _without(value) if key == "text_config" else value for key, value in kept.items()}


def stitch_head(artifact: Path, skeleton: PreTrainedModel, folder: Path) -> str:
    """Put an artifact's head where it belongs in a merged checkpoint; one line about it, "" where there is none.

    Args:
        skeleton: the base on meta. folder: the merged checkpoint, whole but for its head.

    Raises:
        ModelError: the head is not of this base.
    """
    state = merged_head_state(artifact)
    native = native_keys(folder, read_config(str(folder)))
    layers = native.layers if native else 0
    if not state:
        _declare(folder, layers)
        return "none was trained; the checkpoint's own one is as it was" if native else ""
    if native and state.keys() <= native.files.keys():
        _write_into(folder, state)
        _declare(folder, layers)
        return f"{len(state)} tensors of the checkpoint's own head replaced"
    _declare(folder, layers)
    try:
        return _write_draft(folder, skeleton, state)
    except ModelError as error:
        return f"left out: {error}"


def left_beside(artifact: Path, why: str) -> str:
    """One line about an artifact's head in a layout that has no place for it; "" where there is none."""
    return f"the trained one is left out, in the adapter's folder: {why}" if (artifact / HEAD_FILE).is_file() else ""


def _write_into(folder: Path, state: dict[str, Tensor]) -> None:
    """Over the base's tensors of the same names, in their dtype."""
    places = headers_in(folder)
    for name, tensor in state.items():
        path = places[name].path
        with safe_open(path, framework="pt") as opened:
            before = opened.get_tensor(name)
        if before.shape != tensor.shape:
            raise ModelError(f"{path}: {name} is {tuple(before.shape)}, in the head {tuple(tensor.shape)}")
        with path.open("r+b") as file:
            _overwrite(file, places[name].offset, tensor.to(before.dtype))


def _declare(folder: Path, layers: int) -> None:
    """Say in config.json how many layers the head has; what says so already stays as it is, to the byte."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    told = config_with_head(text, layers) if layers else _none_declared(text)
    if told != text:
        write_json(path, told if text is config else {**config, "text_config": told})


def _none_declared(config: dict[str, object]) -> dict[str, object]:
    names = [name for name in ("num_mtp_layers", "mtp_num_hidden_layers") if config.get(name)]
    return {**config, **dict.fromkeys(names, 0), "num_nextn_predict_layers": 0}


def _write_draft(folder: Path, skeleton: PreTrainedModel, state: dict[str, Tensor]) -> str:
    """A folder that servers take as the draft model beside the merged one."""
    tensors, off = draft_tensors(skeleton, state)
    draft = folder / DRAFT_FOLDER
    draft.mkdir()
    save_file({**tensors, **_ends(skeleton, folder)}, draft / "model.safetensors", {"format": "pt"})
    write_json(draft / "config.json", draft_config(skeleton.config, state))
    return f"{DRAFT_FOLDER}/ holds the head for servers, off by {off:.1g} of its largest output"


def _ends(skeleton: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Embedding and output head of the merged checkpoint, under the names that the draft's loader knows."""
    places = headers_in(folder)
    names = {id(module): name for name, module in skeleton.named_modules()}
    found = {}
    wanted = {"model.embed_tokens": skeleton.get_input_embeddings(), "lm_head": skeleton.get_output_embeddings()}
    for ours, module in wanted.items():
        key = f"{names[id(module)]}.weight"
        if key not in places:  # tied to the embedding
            key = f"{names[id(wanted['model.embed_tokens'])]}.weight"
        with safe_open(places[key].path, framework="pt") as opened:
            found[f"{ours}.weight"] = opened.get_tensor(key).clone()
    return found
