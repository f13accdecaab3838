"""Write a checkpoint's int8 form to disk, part by part: one layer's weights are in memory at a time, never the model.

`save_pretrained` wants the whole model loaded first. Here transformers' loader converts the keys of one layer into a
skeleton on meta, what came out becomes a shard, and the skeleton is emptied again. The folder appears under its name
only when it is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from toolkit.checkpoint.config import built, read_config
from toolkit.checkpoint.conversion import missing, refuse_wrong_shapes, targets
from toolkit.checkpoint.files import INDEX, REQUIRES, SINGLE, beside, gguf_at, write_index
from toolkit.checkpoint.gguf_source import opened
from toolkit.checkpoint.identity import license_of, weight_files
from toolkit.checkpoint.remote import fetch
from toolkit.checkpoint.stacks import plain_weights, shapes_in
from toolkit.checkpoint.unused import plain_tensor, unused
from toolkit.durable import staged_folder
from toolkit.errors import ModelError, RecipeError, ResourceError, first_line, machine_failed
from toolkit.quant.gptq.keep import int8_state
from toolkit.quant.kept import kept_stacks
from toolkit.quant.load import storage
from toolkit.quant.quantizer import Int8Config, Int8Quantizer
from toolkit.quant.rounding import first_failure
from toolkit.quant.stored import BESIDE
from toolkit.steps import advance, part

__all__ = ["WrittenCheckpoint", "quantize_checkpoint", "refuse_existing"]

_SMALL = 128 << 20
"""Bytes up to which layers share a shard."""


_CARD = """# {name} in int8

transformers reads these weights once onecard has told it how; without that it refuses them:

```python
import toolkit

toolkit.register()
model = AutoModelForCausalLM.from_pretrained("this folder")
```

Expert stacks and linears are int8 with one fp32 scale for each output row; everything else is as in the original.
"""


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What was written: shards and bytes, bytes of the weights read, and tensors that the model does not use: `kept`
    as they were or multiplied out, and `left_out`."""

    folder: str
    shards: int
    bytes: int
    source_bytes: int
    kept: tuple[str, ...]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@part("quantise")
def quantize_checkpoint(
    name_or_path: str,
    folder: str | Path,
    *,
    revision: str = "main",
    compensated: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    experts: str = "int8",
    stacks: Mapping[str, str] | None = None,
    keep_unused: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WrittenCheckpoint:
    """Write the int8 form of an MoE checkpoint to a new folder; the same checkpoint gives the same bytes again.

    It loads bit-identically to `load_int8(name_or_path)`: with `load_int8(folder)`, or with plain `from_pretrained`
    after `toolkit.register()`, which config.json and the card beside it ask for.

    Args:
        folder: must not exist.
        compensated: this checkpoint as `load_int8` gave it and `compensate_model` rounded it again: its integers and
            scales are written, and what they were rounded from is not read again.
        dtype: of the weights that are not int8; as in the source by default.
        experts: what stacks are rounded to: int8, int4 or mxfp4.
        stacks: full names of expert stacks to int8 or int4, where they are not all what `experts` says.
        keep_unused: what is no parameter of the model, such as layers for drafts, goes along in floats.
        progress: called with shards written and shards in all.

    Raises:
        RecipeError: the folder exists. ModelError: the checkpoint cannot be quantised, or is damaged.
        ResourceError: the disk is full or cannot be written. HubError: the checkpoint cannot be downloaded.
    """
    target = Path(folder)
    refuse_existing(target)
    source = fetch(name_or_path, revision)
    config = read_config(str(source))
    wanted = storage(name_or_path, config, experts, stacks=stacks)
    if wanted is None:
        raise ModelError(f"{name_or_path}: its weights are int8 already; use it as it is")
    try:
        with staged_folder(target) as workplace:
            rounded = {} if compensated is None else int8_state(compensated)
            skeleton = built(name_or_path, config)
            slices = plain_weights(name_or_path, source, wanted.source, skeleton)
            shapes = ((key, shape) for key, (shape, _) in shapes_in(slices).items())
            refuse_wrong_shapes(name_or_path, skeleton, shapes)
            if experts == "source":
                wanted.stacks = kept_stacks(name_or_path, skeleton, slices)
            weights = _Weights(name_or_path, slices, skeleton, dtype, keep_unused)
            shards, size, kept, left_out = _write_weights(weights, wanted, workplace, rounded, progress)
            if gguf_at(source):
                left_out = (*left_out, *opened(source).left_out)
            config.quantization_config = wanted
            config.save_pretrained(workplace)
            _copy_rest(source, workplace)
            _say_what_it_needs(workplace, Path(name_or_path).name, license_of(str(source)))
            read = sum(file.stat().st_size for file in weight_files(source))
    except OSError as error:
        raise ResourceError(f"{target}: cannot be written ({first_line(error)}); free space on the disk") from None
    return WrittenCheckpoint(str(target), shards, size, read, kept, left_out)


def refuse_existing(folder: Path) -> None:
    """Raise `RecipeError` where something has that name: a checkpoint is written to a new folder only."""
    if folder.exists() or folder.is_symlink():
        raise RecipeError(f"{folder}: already exists; give another name")


class _WriterQuantizer(Int8Quantizer):
    """Leaves what is not rounded in the dtype of its file, as a page of it, unless `dtype` is given."""

    keeps_results = False
    dtype: torch.dtype | None = None

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None: as in the file."""
        return super().get_new_dtype(converter, param, self.dtype)


@dataclass(frozen=True)
class _Weights:
    """A checkpoint's weights by key, unread, its model on meta, and how they are written."""

    name: str
    slices: Mapping[str, Any]
    model: PreTrainedModel
    dtype: torch.dtype | None
    keep_unused: bool


def _write_weights(
    weights: _Weights,
    wanted: Int8Config,
    workplace: Path,
    rounded: Mapping[str, torch.Tensor],
    progress: Callable[[int, int], None],
) -> tuple[int, int, tuple[str, ...], tuple[str, ...]]:
    """Shards, bytes, and of what the model does not use the keys that were kept and left out."""
    name, slices, model = weights.name, weights.slices, weights.model
    quantizer = _WriterQuantizer(wanted, pre_quantized=False)
    quantizer.dtype = weights.dtype
    quantizer.preprocess_model(model)
    mapping = get_model_conversion_mapping(model, None, quantizer)
    parameters = targets(model, mapping, slices)
    sizes = {key: value.numel() * value.element_size() for key, value in model.state_dict().items()}
    bins = list(_bins({key: target for key, target in parameters.items() if target in sizes}, sizes))
    beside_model, left_out = unused(parameters, sizes)
    if not weights.keep_unused:
        beside_model, left_out = {}, tuple(key for key, target in parameters.items() if target not in sizes)
    shards = len(bins) + len(beside_model)
    _refuse_full_disk(workplace, sum(sizes.values()))
    loading = LoadStateDictConfig(weight_mapping=mapping, hf_quantizer=quantizer, device_map={"": "cpu"})
    weight_map: dict[str, str] = {}
    total = 0
    for number, keys in enumerate([*bins, *beside_model.values()], 1):
        if number <= len(bins):
            done = {parameters[key] for key in keys} & rounded.keys()
            unread = {key: slices[key] for key in keys if parameters[key] not in done}
            tensors = (_convert(name, model, unread, loading) if unread else {}) | _with_scales(done, rounded)
        else:
            tensors = {key: plain_tensor(slices[key]) for key in keys}
        file = f"model-{number:05}-of-{shards:05}.safetensors" if shards > 1 else SINGLE
        if number == len(bins):  # the other parameters that one tensor of the checkpoint becomes
            tensors |= _with_scales(rounded.keys() - weight_map.keys() - tensors.keys(), rounded)
        _save(tensors, workplace / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        advance(total, sum(sizes.values()), "bytes")
        progress(number, shards)
    _refuse_missing(name, model, weight_map)
    wanted.requantised = quantizer.workspace.requantised.to_dict()
    if shards > 1:
        write_index(workplace, weight_map, total)
    return shards, total, tuple(key for keys in beside_model.values() for key in keys), left_out


def _with_scales(names: Iterable[str], rounded: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    keys = (f"{name}{ending}" for name in names for ending in BESIDE)
    return {key: rounded[key].cpu() for key in keys if key in rounded}


def _bins(parameters: dict[str, str], sizes: dict[str, int]) -> Iterator[list[str]]:
    """Checkpoint keys by the shard they go to: a layer each, or several small ones; what is in no layer, one by one."""
    groups: dict[tuple[int, str], list[str]] = {}
    for key, target in parameters.items():
        layer = re.search(r"\.(\d+)\.", target)
        groups.setdefault((int(layer[1]), "") if layer else (-1, target), []).append(key)
    current: list[str] = []
    size = 0
    for _, keys in sorted(groups.items()):
        more = sum(sizes[target] for target in {parameters[key] for key in keys})
        if current and size + more > _SMALL:
            yield current
            current, size = [], 0
        current, size = [*current, *keys], size + more
    yield current


def _convert(
    name: str, model: PreTrainedModel, slices: dict[str, Any], loading: LoadStateDictConfig
) -> dict[str, torch.Tensor]:
    """What the checkpoint's tensors become, by parameter name; the model is all meta again afterwards."""
    try:
        with first_failure():
            info, _ = convert_and_load_state_dict_in_model(model, slices, loading, None)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        if machine_failed(error):
            raise
        raise ModelError(f"{name}: {first_line(error)}; download the checkpoint again") from None
    for parameter, there, declared in info.mismatched_keys:
        raise ModelError(
            f"{name}: {parameter} is {'×'.join(map(str, there))} in the files and {'×'.join(map(str, declared))} by "
            "config.json; download the checkpoint again"
        )
    for parameter in info.conversion_errors:
        raise ModelError(f"{name}: the tensors for {parameter} do not fit together; download the checkpoint again")
    tensors = {key: value for key, value in model.state_dict().items() if not value.is_meta}
    for key, tensor in tensors.items():
        _forget(model, key, tensor)
    return tensors


def _forget(model: nn.Module, key: str, tensor: torch.Tensor) -> None:
    module_name, _, leaf = key.rpartition(".")
    module, empty = model.get_submodule(module_name), torch.empty_like(tensor, device="meta")
    if leaf in module._buffers:
        module.register_buffer(leaf, empty)
    else:
        module.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))


def _refuse_missing(name: str, model: PreTrainedModel, written: dict[str, str]) -> None:
    if lost := missing(model, (key for key in model.state_dict() if key not in written)):
        raise ModelError(
            f"{name}: the checkpoint lacks {lost[0]} ({len(lost)} in all); download it again or fix config.json"
        )


def _refuse_full_disk(workplace: Path, needed: int) -> None:
    free = shutil.disk_usage(workplace).free
    if needed > free:
        raise ResourceError(
            f"{workplace.parent}: {free / 1e9:.3g} GB free, the int8 checkpoint needs {needed / 1e9:.3g} GB; give a "
            "folder on another disk"
        )


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file({key: tensors[key].contiguous() for key in sorted(tensors)}, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"{path.parent}: cannot be written: {first_line(error)}; free space on the disk") from None


def _say_what_it_needs(workplace: Path, name: str, license: str | None) -> None:
    """In config.json, for who loads it without us, and in a card, for who reads."""
    path = workplace / "config.json"
    config = json.loads(path.read_bytes()) | {"transformers_weights": REQUIRES}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    head = {"library_name": "transformers", "tags": ["onecard", "int8"]} | ({"license": license} if license else {})
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    (workplace / "README.md").write_text("\n".join(["---", *lines, "---", _CARD.format(name=name)]), encoding="utf-8")


def _copy_rest(source: Path, workplace: Path) -> None:
    """Tokenizer, templates, generation config and licence, byte by byte; of a GGUF file what it holds of them."""
    if gguf_at(source):
        from toolkit.checkpoint.gguf_source import put_beside

        put_beside(source, workplace)
        return
    for path in beside(source):
        if path.name not in ("config.json", INDEX):
            shutil.copyfile(path, workplace / path.name)
