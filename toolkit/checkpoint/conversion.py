"""A checkpoint's tensors, unread: which parameter each one becomes, and whether shapes are those that the config says.

`from_pretrained` opens all files inside; code that goes through a checkpoint in parts needs the keys before the data.
transformers compares shapes while it loads. Its own key conversion runs here on tensors without data, so a stack that
the files hold expert by expert is compared as the stack that it becomes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from toolkit.architecture import describe
from toolkit.checkpoint.files import METHOD, declared_format, read_header, shards_of
from toolkit.checkpoint.formats import BESIDE_PACKED, Files, Packed, packed_weights
from toolkit.checkpoint.weights import PackedSlice
from toolkit.errors import ModelError, first_line

__all__ = ["Shards", "every_target", "missing", "refuse_wrong_shapes", "targets"]


class Shards:
    """The tensors of one checkpoint folder as plain weights, mapped while the block lasts or a slice of them lives.

    Args:
        name: what errors call it. declared: its quantization_config, as `declared_format` gives it; what is stored in
            parts is multiplied out when it is read.

    Raises:
        ModelError: no safetensors there, a shard is missing or damaged, or a quantised weight lacks a part.
    """

    def __init__(self, name: str, folder: Path, declared: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.files = [folder / file for file in shards_of(folder, name)]
        self._declared = declared
        self._stack = ExitStack()
        self._opened: dict[str, Any] = {}
        self._packed: dict[str, Packed] = {}

    def __enter__(self) -> Shards:
        metadata: dict[str, str] = {}
        for path in self.files:
            try:
                opened = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise ModelError(
                    f"{self.name}: {path.name} cannot be read: {first_line(error)}; download the checkpoint again"
                ) from None
            self._opened |= dict.fromkeys(opened.keys(), opened)
            metadata |= opened.metadata() or {}
        if (self._declared or {}).get("quant_method") != METHOD:
            self._packed = self._find_packed(metadata)
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened = {}
        self._stack.close()

    @property
    def keys(self) -> tuple[str, ...]:
        """Of every weight, in the files' order; one that is stored in parts stands where its first part does."""
        whole = {part.key: name for name, weight in self._packed.items() for part in weight.parts.values()}
        beside = {key for key in self._opened if key not in whole and _belongs(key, self._packed)}
        return tuple(dict.fromkeys(whole.get(key, key) for key in self._opened if key not in beside))

    def slice(self, key: str) -> Any:
        """A weight, unread until it is indexed, or until its `read` where it is stored in parts."""
        if (packed := self._packed.get(key)) is not None:
            return PackedSlice(packed, {part.key: self._get_slice(part.key) for part in packed.parts.values()})
        return self._get_slice(key)

    def _get_slice(self, key: str) -> Any:
        return self._opened[key].get_slice(key)

    def _find_packed(self, metadata: Mapping[str, str]) -> dict[str, Packed]:
        headers = {key: tensor for path in self.files for key, tensor in read_header(path).items()}
        values = lambda key: self._opened[key].get_tensor(key)  # noqa: E731
        try:
            return packed_weights(Files(self.name, headers, self._declared or {}, values, metadata))
        except ModelError:
            self._stack.close()
            raise


def _belongs(key: str, packed: Mapping[str, Packed]) -> bool:
    """Whether a tensor says something of a packed weight that its values do not need: its shape, scales of inputs."""
    module, _, leaf = key.rpartition(".")
    is_of_weight = key.partition(".weight.")[0] + ".weight" in packed and ".weight." in key
    is_of_stack = leaf.endswith("_input_scale") and key.removesuffix("_input_scale") in packed
    return is_of_weight or is_of_stack or (leaf in BESIDE_PACKED and f"{module}.weight" in packed)


def targets(model: PreTrainedModel, mapping: Iterable[Any], keys: Iterable[str]) -> dict[str, str]:
    """Checkpoint key to the name of the parameter it becomes (the first, where there are several).

    As `convert_and_load_state_dict_in_model` decides it; a key that no parameter takes keeps the name it would have.
    """
    return {key: names[0] for key, names in every_target(model, mapping, keys).items()}


def every_target(model: PreTrainedModel, mapping: Iterable[Any], keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """As `targets`, with all parameters that a tensor is split into."""
    entries = list(mapping)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    parts = {source: entry.target_patterns for entry in converters for source in entry.source_patterns}
    state = model.state_dict()
    result = {}
    for key in keys:
        target, by = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        target = key if target not in state and key in state else target
        first, *others = parts.get(by or "", [""])
        split = [target.replace(first, other) for other in others]
        result[key] = (target, *(name for name in split if name in state and name != target))
    return result


def refuse_wrong_shapes(name: str, model: PreTrainedModel, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Compare the (key, shape) pairs of a checkpoint's plain weights with a model on meta, which stays as it is.

    Raises:
        ModelError: a tensor disagrees with the config or is missing, or the tensors of a stack do not fit together.
    """
    declared = declared_format(name, model.config)
    is_ours = declared is not None and declared["quant_method"] == METHOD
    if is_ours:
        shapes = _unpacked(shapes, model)
    with torch.device("meta"):
        tensors = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in shapes}
    mapping = [] if is_ours else copy.deepcopy(get_model_conversion_mapping(model))
    for conversion in mapping:
        if isinstance(conversion, WeightConverter):
            conversion.force_cpu = False  # a matrix too large for a card; there is nothing here to move
    loading = LoadStateDictConfig(weight_mapping=mapping, device_map={"": "meta"})
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        info, _ = convert_and_load_state_dict_in_model(copy.deepcopy(model), tensors, loading)
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    for parameter, there, wanted in sorted(info.mismatched_keys):
        raise ModelError(
            f"{name}: {parameter} is {_times(there)} in the files and {_times(wanted)} by config.json; "
            f"{_advice(declared)}"
        )
    for parameter in sorted(info.conversion_errors):
        raise ModelError(f"{name}: the tensors for {parameter} do not fit together; download the checkpoint again")
    if tensors and not is_ours and (lost := missing(model, info.missing_keys)):
        raise ModelError(f"{name}: the checkpoint lacks {lost[0]} ({len(lost)} in all); {_advice(declared)}")


def missing(model: PreTrainedModel, without: Iterable[str]) -> list[str]:
    """Of the parameters and buffers that a checkpoint says nothing of, those that it has to, sorted."""
    optional = [*model.all_tied_weights_keys, *(model._keys_to_ignore_on_load_missing or ())]
    return sorted(key for key in without if not any(re.search(pattern, key) for pattern in optional))


def _advice(declared: Mapping[str, Any] | None) -> str:
    if (declared or {}).get("quant_method") == "mlx":
        return "MLX stores some families otherwise: take the unquantised checkpoint, or fix config.json"
    return "download the checkpoint again or fix config.json"


def _unpacked(
    shapes: Iterable[tuple[str, tuple[int, ...]]], model: PreTrainedModel
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes with those of four-bit stacks, [E, I/2, O] bytes, as the family's own."""
    transposed = {name: layer.is_transposed for layer in describe(model).layers for name in layer.stacks}
    for key, shape in shapes:
        if key in transposed and len(shape) == 3:
            experts, half, outputs = shape
            packed = (experts, 2 * half, outputs) if transposed[key] else (experts, outputs, 2 * half)
            shape = packed if tuple(model.get_parameter(key).shape) == packed else shape
        yield key, shape


def _times(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))
