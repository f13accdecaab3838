"""What an MoE model is made of: its expert stacks, routers and linears, found by enumeration.

No table of models. transformers marks every experts module (`use_experts_implementation`), a router is the parameter
beside it with one row per expert, and everything else is read from shapes and positions. What this cannot tell is a row
of data at the end of this file, each with its source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from toolkit.errors import ModelError, first_line

__all__ = [
    "Architecture",
    "ExpertLayer",
    "Linear",
    "bare_modules",
    "describe",
    "expert_parameters",
    "is_experts",
    "skeleton",
    "strip_index",
]


@dataclass(frozen=True)
class ExpertLayer:
    """One MoE layer: where its experts module and its router are, and its two stacks' names and storage order.

    A stack is [E, out, in], or [E, in, out] where `is_transposed`.
    """

    name: str
    up: str
    down: str
    is_transposed: bool
    num_experts: int
    router: str
    router_is_linear: bool

    @property
    def stacks(self) -> tuple[str, str]:
        """Full names of both stacks."""
        return f"{self.name}.{self.up}", f"{self.name}.{self.down}"


@dataclass(frozen=True)
class Linear:
    """An `nn.Linear` and its role: attention, shared, dense, gate (a few outputs that steer others) or head."""

    name: str
    role: str


@dataclass(frozen=True)
class Architecture:
    """Every part that can be quantised or adapted, in model order."""

    layers: tuple[ExpertLayer, ...]
    linears: tuple[Linear, ...]

    def linear_names(self, *roles: str) -> tuple[str, ...]:
        """Names of the linears with one of these roles."""
        return tuple(linear.name for linear in self.linears if linear.role in roles)


def is_experts(module: nn.Module) -> bool:
    """Whether transformers marked this module as an experts module."""
    return (
        hasattr(module, "_is_expert_parallel") and hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    )


def expert_parameters(module: nn.Module) -> tuple[str, str]:
    """Names of the first and second projection's stacks of an experts module."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def describe(model: nn.Module) -> Architecture:
    """Enumerate the MoE layers and linears of `model` (on any device, meta included).

    An adapted model gives the same names as its bare base.

    Raises:
        ModelError: there is no MoE layer, or a router cannot be told.
    """
    modules = bare_modules(model)
    layers = tuple(_layer(modules, name) for name, module in modules.items() if is_experts(module))
    if not layers:
        raise ModelError(
            f"{type(model).__name__}: not a Mixture-of-Experts model (no experts module in it); "
            "give an MoE checkpoint, e.g. one named in recipes/"
        )
    return Architecture(layers, tuple(_linears(model, modules, layers)))


def skeleton(name_or_path: str, *, revision: str = "main") -> PreTrainedModel:
    """The model on the meta device, from its config alone: shapes and names, no weights.

    Raises:
        ModelError: no config there, a family this transformers does not know, or one that needs remote code.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name_or_path}: {first_line(error)}") from None


def strip_index(name: str) -> str:
    """`model.layers.3.mlp.experts` to `mlp.experts`: what follows the last layer number."""
    return re.split(r"(?:^|\.)\d+\.", name)[-1]


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name as if nothing had been wrapped: PEFT keeps what it wraps in `base_layer`, its own in `lora_*`."""
    return {name.replace(".base_layer", ""): module for name, module in model.named_modules() if ".lora_" not in name}


def _layer(modules: Mapping[str, nn.Module], name: str) -> ExpertLayer:
    experts = modules[name]
    up, down = expert_parameters(experts)
    stack = getattr(experts, down)
    num_experts = int(stack.shape[0])
    hidden = int(stack.shape[2 if experts.is_transposed else 1])
    router, is_linear = _find_router(modules, name, num_experts, hidden)
    return ExpertLayer(name, up, down, bool(experts.is_transposed), num_experts, router, is_linear)


def _find_router(modules: Mapping[str, nn.Module], name: str, num_experts: int, hidden: int) -> tuple[str, bool]:
    """The one module near the experts whose `weight` is [E, H]; the search widens from the parent outwards."""
    parent = name
    while "." in parent:
        parent = parent.rpartition(".")[0]
        if parent.rpartition(".")[2].isdigit() and (found := _ROUTERS_BESIDE.get(type(modules[parent]).__name__)):
            return f"{parent}.{found}", isinstance(modules[f"{parent}.{found}"], nn.Linear)
        candidates = [
            key
            for key, module in modules.items()
            if key.startswith(f"{parent}.") and not key.startswith(f"{name}.") and key != name
            if getattr(getattr(module, "weight", None), "shape", None) == (num_experts, hidden)
        ]
        if len(candidates) == 1:
            return candidates[0], isinstance(modules[candidates[0]], nn.Linear)
        if candidates or parent.rpartition(".")[2].isdigit():
            break
    raise ModelError(
        f"{name}: cannot tell its router: {len(candidates)} parameters of shape ({num_experts}, {hidden}) beside it"
        f"{' (' + ', '.join(candidates[:3]) + ')' if candidates else ''}; please report this model family"
    )


def _linears(model: nn.Module, modules: Mapping[str, nn.Module], layers: tuple[ExpertLayer, ...]) -> Iterator[Linear]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    routers = {layer.router for layer in layers}
    blocks = {layer.name.rpartition(".")[0] for layer in layers}
    experts = tuple(f"{layer.name}." for layer in layers)
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and name not in routers and not name.startswith(experts):
            yield Linear(name, _role(name, module, module is head, blocks))


def _role(name: str, module: nn.Linear, is_head: bool, blocks: set[str]) -> str:
    if is_head or not re.search(r"\.\d+\.", f".{name}"):
        return "head"
    if module.out_features < _GATE_OUTPUTS:
        return "gate"
    if any(name.startswith(f"{block}.") for block in blocks) and not _is_attention(name):
        return "shared"
    return "attention" if _is_attention(name) else "dense"


def _is_attention(name: str) -> bool:
    return any(re.search(_ATTENTION, part) for part in strip_index(name).split(".")[:-1])


_GATE_OUTPUTS = 16
"""A linear with fewer outputs than this steers others (a shared-expert gate) and is too small to be worth 8 bit."""

_ATTENTION = r"attn|attention|mixer|mamba|ssm|linear_attn|conv|temporal"
"""Names of the token-mixing block of a decoder layer, in transformers' modeling files."""

_ROUTERS_BESIDE: dict[str, str] = {}
"""Decoder-layer class to the router's path in it, where shapes do not tell."""
