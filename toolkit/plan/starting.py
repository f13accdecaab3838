"""Settings to start with: the first of a few, from generous to frugal, whose plan fits the card.

A newcomer has no opinion on rank and optimizer yet; the plan has the arithmetic. Nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.errors import ResourceError
from toolkit.plan.devices import choose_device
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


def first_that_fits(model: str, data: str, card: str | None = None) -> tuple[dict[tuple[str, str], Any], Plan]:
    """Fields (section, key) of a recipe that plans successfully, and its plan.

    Args:
        model: a folder or Hub name. data: the training examples.
        card: a name that `--device` takes, or None for this machine.

    Raises:
        RecipeError: no such card. ResourceError: none of the settings fits. ModelError: no such model.
    """
    device = choose_device(card)
    why: ResourceError | None = None
    for lora, training in _STARTS:
        fields = {("model", "model_name_or_path"): model, ("data", "train"): data, ("data", "validation_size"): 0.05}
        fields |= {("lora", key): value for key, value in lora.items()}
        fields |= {("training", key): value for key, value in training.items()}
        try:
            made = make_plan(_recipe(fields), device=device)
            made.require_fit()
            return fields, made
        except ResourceError as error:
            why = error
    raise why or ResourceError(f"{model}: does not fit")


def _recipe(fields: Mapping[tuple[str, str], Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {}
    for (section, key), value in fields.items():
        sections.setdefault(section, {})[key] = value
    return Recipe.model_validate(sections)
