"""The backends by name, registered at transformers' own seam (`ALL_EXPERTS_FUNCTIONS`).

An experts module then computes with `experts_implementation="onecard_<backend>"`; nothing of transformers is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from toolkit.architecture import is_experts
from toolkit.ops import per_expert, reference
from toolkit.ops.experts import expert_weights
from toolkit.ops.unordered import write_in_any_order

__all__ = ["BACKENDS", "DEFAULT_BACKEND", "FACTORS", "keep_up_outputs"]

FACTORS = "onecard_factors"
"""Attribute of an experts module: {stack name: LoraFactors} while an adapter is active."""

_KEEP_UP = "onecard_keep_up"


def _triton(name: str, *args: object, **options: object) -> torch.Tensor:
    """Triton is imported by the first layer that runs: most machines without a card have none."""
    output: torch.Tensor = getattr(import_module("toolkit.ops.triton"), name)(*args, **options)
    return output


_TRITON: Mapping[str, Callable[..., torch.Tensor]] = {
    "onecard_triton": partial(_triton, "expert_layer"),
    "onecard_triton_w8a8": partial(_triton, "expert_layer_w8a8"),
}

BACKENDS: Mapping[str, Callable[..., torch.Tensor]] = {
    "onecard_per_expert": per_expert.expert_layer,
    "onecard_reference": reference.expert_layer,
    **(_TRITON if find_spec("triton") else {}),
}


def _forward_with(layer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def experts_forward(
        self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        weights = expert_weights(self)
        factors = getattr(self, FACTORS, {})
        up = factors.get("gate_up_proj" if self.has_gate else "up_proj")
        keep_up = getattr(self, _KEEP_UP, False)
        if hidden_states.is_cuda:
            write_in_any_order(top_k_weights)
        return layer(hidden_states, top_k_index, top_k_weights, weights, up, factors.get("down_proj"), keep_up=keep_up)

    return experts_forward


def keep_up_outputs(model: nn.Module, keep: bool) -> None:
    """Whether every expert layer keeps its first projection's output for backward, or computes it again there.

    Under gradient checkpointing it should be kept: then one layer's is alive at a time, and nothing is computed thrice.
    """
    for module in model.modules():
        if is_experts(module):
            module.__dict__[_KEEP_UP] = keep


DEFAULT_BACKEND = "onecard_per_expert"
"""Runs on every device."""

for _name, _layer in BACKENDS.items():
    ALL_EXPERTS_FUNCTIONS.register(_name, _forward_with(_layer))
