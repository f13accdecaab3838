"""Whether transformers takes a schedule with its options: asked before the model is loaded, of the function itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import get_scheduler

from toolkit.errors import RecipeError, first_line

__all__ = ["require_schedule"]

_STEPS = 1000


def require_schedule(name: str, options: Mapping[str, Any]) -> None:
    """Raise `RecipeError` where a schedule of transformers' lacks an option, does not know one, or cannot use it."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        made = get_scheduler(name, optimizer, 1, _STEPS, scheduler_specific_kwargs=dict(options))
        for step in (0, _STEPS // 2, _STEPS):
            float(made.lr_lambdas[0](step))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RecipeError(f"training.lr_scheduler_kwargs: {name}: {first_line(error)}") from None
