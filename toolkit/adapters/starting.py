"""Whether an adapter can be trained on from: its kind, names and shapes, before the base is loaded.

PEFT reads more kinds of LoRA than leave this house whole: modules saved beside the pairs, magnitudes, biases, starts
that change the base. A run from one of those would train for hours towards a folder that nothing opens.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from toolkit.adapters.attach import load_own_layout, misfit
from toolkit.adapters.layouts import MAGNITUDES, ROWS
from toolkit.adapters.older import in_own_names
from toolkit.adapters.tokens import INDICES, token_ids
from toolkit.adapters.untrusted import CONFIG, WEIGHTS, check_adapter_files, read_adapter_config
from toolkit.checkpoint.files import read_header
from toolkit.errors import ModelError

__all__ = ["BEYOND_PAIRS", "check_start"]

_PAIR = re.compile(r".+\.lora_[AB]\.weight")
BEYOND_PAIRS = {
    "modules_to_save": "modules saved whole",
    INDICES: "rows of the embedding",
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases",
    "layer_replication": "layers used twice",
    "alora_invocation_tokens": "an adapter that tokens switch on",
    "use_qalora": "QA-LoRA's pooled inputs",
    "use_bdlora": "blocks",
    "arrow_config": "a router of adapters",
    "kasa_config": "KaSA's singular values",
    "monteclora_config": "sampled weights",
    "megatron_config": "Megatron's layers",
}
"""Fields of PEFT's `LoraConfig` that mean more than pairs of A and B, and what."""
_STARTS_BESIDE = ("gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base's weights alone; others move a part of them into the adapter."""


def check_start(folder: Path, model: PreTrainedModel, tokens: Sequence[int] = (), *, use_dora: bool = False) -> None:
    """Raise `ModelError` unless a LoRA adapter can be trained on from; only the headers of its tensors are read.

    Args:
        folder: an adapter in a layout that PEFT opens. model: the base on the meta device, with rows for new tokens; it
            is changed. tokens: the ids of those whose rows the run trains, which the adapter must hold.
        use_dora: whether the run trains magnitudes, which the adapter must hold.
    """
    check_adapter_files(folder)
    config = read_adapter_config(folder / CONFIG)
    if token_ids(config) != sorted(tokens):
        raise ModelError(f"{folder / CONFIG}: {_other_rows(token_ids(config), tokens)}")
    if use_dora and not config.get("use_dora"):
        raise ModelError(f"{folder / CONFIG}: has no magnitudes to train on; remove lora.use_dora, or start without it")
    wanted = {INDICES: bool(tokens), "use_dora": use_dora}
    for field, what in BEYOND_PAIRS.items():
        if config.get(field) and not wanted.get(field):
            raise ModelError(f"{folder / CONFIG}: {field}: {_refusal(what)}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _STARTS_BESIDE:
        raise ModelError(f"{folder / CONFIG}: init_lora_weights: {_refusal(f'a base that {start[:20]} has changed')}")
    header = read_header(folder / WEIGHTS, "copy it again")
    for name in sorted(header):
        is_wanted = (tokens and name.endswith(ROWS)) or (use_dora and name.endswith(MAGNITUDES))
        if not _PAIR.fullmatch(name) and not is_wanted:
            raise ModelError(f"{folder / WEIGHTS}: {name[:120]}: {_refusal('a tensor that is no A or B of a linear')}")
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if head and (found := next((name for name in header if f".{head}.lora_" in name), None)):
        raise ModelError(f"{folder / WEIGHTS}: {found}: {_refusal('an adapter on the output head')}")
    _check_layout(folder, model, {name: tensor.shape for name, tensor in header.items()})


def _other_rows(held: Sequence[int], wanted: Sequence[int]) -> str:
    if not wanted:
        shown = ", ".join(map(str, held[:5])) + (", …" if len(held) > 5 else "")
        return (
            f"holds trained rows of tokens ({shown}): list them in model.trained_tokens, or in model.new_tokens where "
            "the base lacks them; or merge it into its base with the program that made it, and start from that"
        )
    return (
        "does not hold the rows of just the tokens in model.new_tokens and model.trained_tokens; start from an adapter "
        "that was trained with them, or without an adapter"
    )


def _refusal(what: str) -> str:
    return (
        f"{what}: a run from it could not be packaged so that it opens again; merge it into its base with the program "
        "that made it and give that as model.model_name_or_path, or start from an adapter of A and B alone"
    )


def _check_layout(folder: Path, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """As PEFT would load it, with tensors that have shapes and no numbers."""
    tensors: dict[str, Tensor] = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        config: Any = LoraConfig.from_pretrained(str(folder))
        config.init_lora_weights, config.base_model_name_or_path = False, None
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ranks per parameter are called unmatched, and meta tensors no-ops
            peft_model = get_peft_model(model, in_own_names(config, model, tensors))
            if load_own_layout(peft_model, tensors):
                return
            result = set_peft_model_state_dict(peft_model, tensors)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: does not fit this base model: {misfit(error)}") from None
    lacking = [name for name in result.missing_keys if "lora_" in name]
    for what, names in (("lacks", lacking), ("has a key the model has not:", result.unexpected_keys)):
        if names:
            raise ModelError(f"{folder}: the adapter {what} {names[0]} ({len(names)} in all); it is for another model")
