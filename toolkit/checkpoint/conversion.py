"""A checkpoint's tensors, unread: which parameter each one becomes, and whether shapes are those that the config says.

`from_pretrained` opens all files inside; code that goes through a checkpoint in parts needs the keys before the data.
transformers compares shapes while it loads. Its own key conversion runs here on tensors without data, so a stack that
the files hold expert by expert is compared as the stack that it becomes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
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

from toolkit.checkpoint.files import METHOD, declared_format, shards_of
from toolkit.errors import ModelError, first_line

__all__ = ["Shards", "refuse_wrong_shapes", "targets"]


class Shards:
    """The files of one checkpoint folder, mapped while the block lasts; `name` is what errors call it.

    Raises:
        ModelError: no safetensors there, or a shard is missing or damaged.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.files = [folder / file for file in shards_of(folder, name)]
        self._stack = ExitStack()
        self._opened: dict[str, Any] = {}

    def __enter__(self) -> Shards:
        for path in self.files:
            try:
                opened = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise ModelError(
                    f"{self.name}: {path.name} cannot be read: {first_line(error)}; download the checkpoint again"
                ) from None
            self._opened |= dict.fromkeys(opened.keys(), opened)
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened = {}
        self._stack.close()

    @property
    def keys(self) -> tuple[str, ...]:
        """Of every tensor, in the files' order."""
        return tuple(self._opened)

    @property
    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor with its shape."""
        return ((key, tuple(self.slice(key).get_shape())) for key in self._opened)

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(path.stat().st_size for path in self.files)

    def slice(self, key: str) -> Any:
        """The tensor, unread until it is indexed."""
        return self._opened[key].get_slice(key)


def targets(model: PreTrainedModel, mapping: Iterable[Any], keys: Iterable[str]) -> dict[str, str]:
    """Checkpoint key to the name of the parameter it becomes (the first, where there are several).

    As `convert_and_load_state_dict_in_model` decides it; a key that no parameter takes keeps the name it would have.
    """
    entries = list(mapping)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    result = {}
    for key in keys:
        target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        result[key] = key if target not in state and key in state else target
    return result


def refuse_wrong_shapes(name: str, model: PreTrainedModel, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Compare a checkpoint's (key, shape) pairs with a model on meta, which stays as it is.

    FP8 and MXFP4 weights are left to the loader: their blocks and scales have shapes of their own.

    Raises:
        ModelError: a tensor disagrees with the config, or the tensors of a stack do not fit together.
    """
    declared = declared_format(name, model.config)
    if declared is not None and declared["quant_method"] != METHOD:
        return
    with torch.device("meta"):
        tensors = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in shapes}
    mapping = copy.deepcopy(get_model_conversion_mapping(model)) if declared is None else []
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
            f"{name}: {parameter} is {_times(there)} in the files and {_times(wanted)} by config.json; download the "
            "checkpoint again or fix config.json"
        )
    for parameter in sorted(info.conversion_errors):
        raise ModelError(f"{name}: the tensors for {parameter} do not fit together; download the checkpoint again")


def _times(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))
