"""What each expert stack is in, before anything is loaded: as the recipe says, or as its checkpoint has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from toolkit.checkpoint.files import METHOD, declared_format, here
from toolkit.errors import ModelError, RecipeError
from toolkit.plan.budget import Budget
from toolkit.plan.shapes import Shapes, is_published, stored_method
from toolkit.plan.stacks import Choice, with_budget, with_stacks
from toolkit.recipe.schema import QuantizationSection

__all__ = ["kept_in", "shapes_for"]

_ASSUMED = {"mxfp4": "mxfp4", "compressed-tensors": "grouped:32:F16", "gptq": "grouped:128:F16"}
"""Of a checkpoint on the Hub whose files are not here: its scales are no smaller than that."""


def shapes_for(
    budget: Budget, asked: QuantizationSection, *, is_ours: bool, stacks: Mapping[str, str] | None = None
) -> tuple[Shapes, Choice | None, str]:
    """Shapes that say what stacks are in, where they differ; what is left to choose; and a word on a budget.

    Args:
        is_ours: whether the checkpoint is one that was rounded here. stacks: a mixture that was chosen before.

    Raises:
        RecipeError: a budget that is too small, or for stacks that are rounded already.
        ModelError: nothing is stored in four bits that can be kept, or `stacks` are another model's.
    """
    shapes = budget.shapes
    if asked.experts == "source":
        return replace(shapes, stacks=kept_in(budget)), None, ""
    if asked.budget is None:
        declared = declared_format(budget.name, budget.model.config) if is_ours else None
        return replace(shapes, stacks=dict((declared or {}).get("stacks") or {})), None, ""
    if is_ours:
        raise RecipeError(
            f"quantization.budget: {budget.name} is rounded already; remove the line, or take the checkpoint it was "
            "made from"
        )
    return with_budget(shapes, asked.budget) if stacks is None else (with_stacks(shapes, stacks), None, "")


def kept_in(budget: Budget) -> Mapping[str, str]:
    """Every stack to what it stays in; int8 where it cannot be kept.

    Raises:
        ModelError: nothing is stored in four bits that can be kept.
    """
    name, revision = budget.name, budget.revision
    stacks = [stack for layer in budget.shapes.architecture.layers for stack in layer.stacks]
    folder = here(name, revision)
    if folder is None:
        if is_published(name, revision):
            method = stored_method(name)
        else:
            method = (declared_format(name, budget.model.config) or {}).get("quant_method")
        if method not in _ASSUMED:
            raise ModelError(
                f"{name}: quantization.experts=source keeps what is stored in four bits, and this checkpoint is "
                f"{method or 'of floats'}; set it to int8 or int4"
            )
        return dict.fromkeys(stacks, _ASSUMED[method])
    declared = declared_format(name, budget.model.config)
    if declared is not None and declared["quant_method"] == METHOD:
        return dict(declared.get("stacks") or {})
    from toolkit.checkpoint.stacks import plain_weights
    from toolkit.quant.kept import kept_stacks

    return kept_stacks(name, budget.model, plain_weights(name, folder, declared, budget.model))
