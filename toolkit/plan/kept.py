"""What each expert stack is in where a recipe keeps the four bits of its checkpoint, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from toolkit.checkpoint.files import METHOD, declared_format, here
from toolkit.errors import ModelError
from toolkit.plan.budget import Budget
from toolkit.plan.shapes import is_published, stored_method

__all__ = ["kept_in"]

_ASSUMED = {"mxfp4": "mxfp4", "compressed-tensors": "grouped:32:F16", "gptq": "grouped:128:F16"}
"""Of a checkpoint on the Hub whose files are not here: its scales are no smaller than that."""


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
