"""The model of a run without its numbers: int8 stacks and linears, adapters in place, only as deep as it has to be.

`torch.device("meta")` gives shapes, but operators on it take other paths than on the device meant; `FakeTensorMode`
takes the device's own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from toolkit.adapters import attach_lora
from toolkit.architecture import describe, is_experts
from toolkit.ops import keep_up_outputs
from toolkit.ops.experts import expert_weights
from toolkit.quant.quantizer import Int8Config, Int8Quantizer

__all__ = ["Depths", "adapted", "decoder_layers", "depths_of", "truncate"]

_LONGEST_PERIOD = 12


@dataclass(frozen=True)
class Depths:
    """Layers of the model, and two smaller depths that tell all others: `period` more of them repeat the same kinds."""

    all: int
    short: int
    period: int

    @property
    def repeats(self) -> int:
        """Periods between the short depth and the whole."""
        return (self.all - self.short) // self.period if self.period else 0


def adapted(
    model: PreTrainedModel,
    lora: Mapping[str, Any],
    *,
    experts: str,
    linears: str,
    keep_up: bool,
    backend: str,
    new_tokens: int = 0,
) -> PeftModel:
    """A meta skeleton as it is after loading and attaching, still on meta; the skeleton becomes part of it.

    Args:
        new_tokens: how many tokens' rows are trained: the embedding's first ones stand in for them.
    """
    model.requires_grad_(False)
    model.set_experts_implementation(backend)
    if backend.startswith("onecard_triton"):
        _recognize_gates(model)
    stored = Int8Quantizer(Int8Config(experts, "none" if linears == "bnb" else linears))
    stored._process_model_before_weight_loading(model)
    with torch.device("meta"):
        result = attach_lora(model, **lora, new_token_ids=range(new_tokens))
    keep_up_outputs(result, keep_up)
    return result


def _recognize_gates(model: nn.Module) -> None:
    """The kernels know a gate by its numbers, of which there are none later on; what is known stays known."""
    from toolkit.ops.triton.gates import recognize

    for module in model.modules():
        if is_experts(module):
            weights = expert_weights(module)
            recognize(weights.gate, weights.up.outputs, torch.device("cpu"))


def decoder_layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list that holds the MoE layers, with its owner and its name there."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = describe(base).layers[0].name.split(".")
    index = next(number for number, part in enumerate(parts) if part.isdigit())
    owner = base.get_submodule(".".join(parts[: index - 1]))
    layers = getattr(owner, parts[index - 1])
    assert isinstance(layers, nn.ModuleList)
    return owner, parts[index - 1], layers


def depths_of(model: nn.Module) -> Depths:
    """How deep it has to be for its kinds of layers to be told apart from their number."""
    kinds = [_kind(layer) for layer in decoder_layers(model)[2]]
    best = Depths(len(kinds), len(kinds), 0)
    for period in range(1, _LONGEST_PERIOD + 1):
        for short in range(2 * period, len(kinds) - period + 1):
            # One more period before the last: a layer with its like on both sides may be the highest of all.
            tail = kinds[short - 2 * period :]
            if tail == [tail[number % period] for number in range(len(tail))] and (len(kinds) - short) % period == 0:
                if short + period < best.short + best.period:
                    best = Depths(len(kinds), short, period)
                break
    return best


def _kind(layer: nn.Module) -> str:
    """All that tells one kind of layer from another: classes, shapes, and plain attributes but its number."""
    found = []
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | bool | type(None))}
        plain = {k: v for k, v in plain.items() if not k.startswith("_") and k not in ("layer_idx", "layer_id")}
        shapes = {k: tuple(p.shape) for k, p in module.named_parameters(recurse=False)}
        found.append((name, type(module).__name__, sorted(plain.items(), key=str), shapes))
    return str(found)


def truncate(model: PeftModel, depth: int) -> None:
    """Drop all decoder layers from number `depth` on."""
    owner, name, layers = decoder_layers(model)
    if depth == len(layers):
        return
    setattr(owner, name, nn.ModuleList(list(layers)[:depth]))
    config = copy.copy(owner.config)
    config.__dict__["num_hidden_layers"] = depth
    owner.config = config
