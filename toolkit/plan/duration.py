"""The time an optimizer step cannot beat on a card, and an honest guess of what it takes.

Three limits, each from counted work and the card's published rates: products on the tensor cores, weights through the
memory, streamed stacks through the bus. Perfect overlap leaves the slowest of them; nothing can be faster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import nn

from toolkit.architecture import LINEAR_ROLES, Architecture
from toolkit.plan.cards import Card
from toolkit.plan.head import experts_per_token
from toolkit.plan.memory import Bytes
from toolkit.plan.place import streamed
from toolkit.recipe import Recipe

__all__ = ["Duration", "step_duration"]

_REACHED = {"arithmetic": 0.45, "memory": 0.8, "bus": 0.8}
"""Shares of the published rates that large products, long reads and pinned copies reach on cards of this kind. They are
assumed: nothing here has run on a card."""


@dataclass(frozen=True)
class Duration:
    """Seconds of an optimizer step: each limit alone, and the estimate."""

    arithmetic: float
    memory: float
    bus: float
    estimate: float

    @property
    def limit(self) -> float:
        """What it cannot beat."""
        return max(self.arithmetic, self.memory, self.bus)

    def to_dict(self) -> dict[str, float]:
        """JSON-able."""
        return {**asdict(self), "limit": self.limit}


def step_duration(
    model: nn.Module,
    architecture: Architecture,
    recipe: Recipe,
    card: Card,
    sizes: Bytes,
    stacks: Mapping[str, int],
    placement: Mapping[str, str],
    adapter: int,
    length: int,
) -> Duration:
    """Of all micro-batches of one optimizer step. `stacks`: MoE layer to bytes. `adapter`: trained parameters."""
    training = recipe.training
    passes = 4 if training.gradient_checkpointing else 3  # forward, again, input gradients; factors' in 3 all the same
    micro = training.gradient_accumulation_steps
    tokens = micro * training.per_device_train_batch_size * length
    frozen = _active(model, architecture) * tokens * 2 * (passes - 1)
    attention = _attention(model, length) * tokens * (passes - 0.5)
    low_rank = adapter * _share(model, architecture) * tokens * 2 * passes
    arithmetic = (frozen + attention + low_rank) / (card.bf16_tflops * 1e12)
    weights = sizes.linears + sizes.other + sum(stacks.values())
    moved = micro * (passes - 1) * weights + 2 * (sizes.adapter + sizes.gradients + sizes.optimizer)
    away = sum(stacks[name] for name in streamed(placement))
    limits = {
        "arithmetic": arithmetic,
        "memory": moved / (card.memory_rate * 1e9),
        "bus": 2 * micro * away / (card.pcie_rate * 1e9),
    }
    likely = {name: seconds / _REACHED[name] for name, seconds in limits.items()}
    return Duration(**limits, estimate=max(likely["arithmetic"] + likely["memory"], likely["bus"]))


def _active(model: nn.Module, architecture: Architecture) -> float:
    """Frozen parameters that a token is multiplied with."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = architecture.linear_names(*LINEAR_ROLES, "head")
    linears = sum(math.prod(shapes.get(f"{name}.weight", (0,))) for name in names)
    stacks = sum(math.prod(shapes[name]) for layer in architecture.layers for name in layer.stacks)
    return linears + stacks * _share(model, architecture)


def _share(model: nn.Module, architecture: Architecture) -> float:
    """Experts per token over experts."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    experts = architecture.layers[0].num_experts
    return min(1.0, experts_per_token(config, experts) / experts)


def _attention(model: nn.Module, length: int) -> float:
    """Operations a token of scores and their sums, causal: half of 2·2·L for each head's width in each layer."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return float(2 * length * heads * width * config.num_hidden_layers)
