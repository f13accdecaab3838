"""Which MoE layers' expert stacks stay on the device and which are streamed through it: a static split, made once.

accelerate's device maps split by module order and move whole layers back and forth; here only frozen expert stacks
move, and those that do are spread evenly, so that a resident layer's work hides the next one's copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from toolkit.recipe import Recipe

__all__ = ["SLOTS", "most_micro_batches_per_pass", "resident_bytes", "share_of", "spread", "streamed"]

SLOTS = 2
"""Device buffers that streamed layers pass through: one is computed with while the next one is filled."""


def spread(layers: Mapping[str, int], count: int, place: str) -> dict[str, str]:
    """`count` of the layers to `place`, evenly between the resident ones.

    Args:
        layers: module name to bytes of its stacks, in model order.
    """
    total, count = len(layers), min(count, len(layers))
    moved = [(number + 1) * count // total > number * count // total for number in range(total)]
    return {name: place if away else "resident" for name, away in zip(layers, moved, strict=True)}


def streamed(placement: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the layers that are not resident."""
    return tuple(name for name, place in placement.items() if place != "resident")


def resident_bytes(layers: Mapping[str, int], placement: Mapping[str, str]) -> tuple[int, int]:
    """Bytes of the stacks that stay on the device, and of the slots that the others pass through."""
    away = [layers[name] for name in streamed(placement)]
    return sum(layers.values()) - sum(away), min(SLOTS, len(away)) * max(away, default=0)


def share_of(layers: Mapping[str, int], share: float) -> int:
    """How many layers a share of them is, rounded up."""
    return math.ceil(share * len(layers))


def most_micro_batches_per_pass(recipe: Recipe) -> int:
    """Micro-batches of an optimizer step that may go through a streamed layer before the next; 1 is the usual order.

    Dropout draws random numbers in order, offloaded activations and a head know one micro-batch at a time.
    """
    alone = recipe.training.activation_offloading or recipe.lora.lora_dropout > 0 or recipe.mtp.reads_data
    return 1 if alone else recipe.training.gradient_accumulation_steps
