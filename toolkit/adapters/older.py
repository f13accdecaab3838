"""Names that a family's linears had before transformers 5 stacked its experts, as PEFT rewrites them.

PEFT does so for every config that it opens, new ones too (`convert_peft_config_for_transformers`). Two things go wrong
there: shared experts and dense layers of the same name are taken for experts, and rsLoRA's scaling is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel

from toolkit.adapters.layouts import PREFIX
from toolkit.architecture import describe

__all__ = ["in_own_names", "spell_for_peft"]


def in_own_names(config: Any, model: PreTrainedModel, stored: Iterable[str]) -> Any:
    """Rewrite an opened `LoraConfig` into `model`'s own names, with the scaling that it was trained with; returns it.

    Of gate and up PEFT makes one pair of twice the rank, and doubles alpha. That keeps alpha / rank; rsLoRA divides by
    the rank's root, so there alpha grows by the root too. Shared experts and dense layers that the adapter has keep it.

    Args:
        stored: the keys of the adapter's tensors.

    Raises:
        ValueError: the config names one of gate and up without the other.
    """
    given, asked = set(config.alpha_pattern), config.target_modules
    convert_peft_config_for_transformers(config, model, None)
    if config.use_rslora:
        for name in set(config.alpha_pattern) - given:
            config.alpha_pattern[name] = config.lora_alpha * math.sqrt(config.rank_pattern[name] / config.r)
    if not isinstance(asked, str) and (taken := tuple(set(asked or ()) - set(config.target_modules or ()))):
        ends = tuple(f".{name}" for name in taken)
        held = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in stored}
        names = [linear.name for linear in describe(model).linears if linear.name in held]
        beside = {f"{name}.weight" for name in names if name in taken or name.endswith(ends)}
        config.target_parameters = {*config.target_parameters, *beside}
    return config


def spell_for_peft(
    model: PreTrainedModel, modules: Sequence[str], parameters: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Move modules that PEFT would mistake for experts to `target_parameters`, where it takes names literally.

    The file layout is the same either way.
    """
    mistaken = {leaf for leaf in {name.rpartition(".")[2] for name in modules} if _is_rewritten(model, leaf)}
    moved = [name for name in modules if name.rpartition(".")[2] in mistaken]
    kept = [name for name in modules if name not in moved]
    return tuple(kept), (*parameters, *(f"{name}.weight" for name in moved))


def _is_rewritten(model: PreTrainedModel, leaf: str) -> bool:
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return True  # one of several names that PEFT would fuse together
    return leaf not in (config.target_modules or ())
