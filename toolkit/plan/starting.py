"""Settings to start with: the first of a few, from generous to frugal, whose plan fits the card.

A newcomer has no opinion on rank and optimizer yet; the plan has the arithmetic. Nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.errors import RecipeError, ResourceError, did_you_mean
from toolkit.plan.cards import CARDS
from toolkit.plan.make import Plan, make_plan
from toolkit.recipe import Recipe

__all__ = ["first_that_fits"]

_FRUGAL = {"optim": "paged_adamw_8bit"}
_STARTS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {}),
    ({}, _FRUGAL),
    ({"r": 8, "lora_alpha": 16}, _FRUGAL),
    ({"r": 4, "lora_alpha": 8}, {**_FRUGAL, "max_length": 512}),
)
"""Fields of the sections lora and training."""
_FOR_ACTIVATIONS = 0.15
"""Share of the memory that must be left over."""


def first_that_fits(model: str, data: str, card: str | None = None) -> tuple[dict[tuple[str, str], Any], Plan]:
    """Fields (section, key) of a recipe that plans successfully, and its plan.

    Args:
        model: a folder or Hub name. data: the training examples.
        card: a name of `CARDS`, or None for this machine.

    Raises:
        RecipeError: no such card. ResourceError: none of the settings fits. ModelError: no such model.
    """
    if card is not None and card not in CARDS:
        raise RecipeError(f"--card {card}: not known{did_you_mean(card, list(CARDS))}; there are {', '.join(CARDS)}")
    why: ResourceError | None = None
    for lora, training in _STARTS:
        fields = {("model", "model_name_or_path"): model, ("data", "train"): data, ("data", "validation_size"): 0.05}
        fields |= {("lora", key): value for key, value in lora.items()}
        fields |= {("training", key): value for key, value in training.items()}
        try:
            return fields, _plan(fields, card)
        except ResourceError as error:
            why = error
    raise why or ResourceError(f"{model}: does not fit")


def _plan(fields: Mapping[tuple[str, str], Any], card: str | None) -> Plan:
    """The plan, or `ResourceError` where it leaves too little for activations."""
    on_card = {("model", "dtype"): "bfloat16"} if card else {}  # as there, whatever this machine has
    made = make_plan(_recipe({**fields, **on_card}))
    memory = CARDS[card].memory if card else made.memory
    if made.bytes.total > (1 - _FOR_ACTIVATIONS) * memory:
        raise ResourceError(
            f"{made.model}: needs {made.bytes.total / 2**30:.1f} GiB before activations even with a rank-4 adapter, "
            f"{card or 'this machine'} has {memory / 2**30:.1f} GiB; take a smaller model or a larger card"
        )
    return made


def _recipe(fields: Mapping[tuple[str, str], Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {}
    for (section, key), value in fields.items():
        sections.setdefault(section, {})[key] = value
    return Recipe.model_validate(sections)
