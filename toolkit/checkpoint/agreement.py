"""Whether a checkpoint's tensors have the shapes that its config says, told from the headers before anything is read.

transformers compares them while it loads. Its own key conversion runs here on tensors without data, so a stack that the
files hold expert by expert is compared as the stack that it becomes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from toolkit.checkpoint.formats import METHOD, declared_format
from toolkit.errors import ModelError

__all__ = ["refuse_wrong_shapes"]


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
