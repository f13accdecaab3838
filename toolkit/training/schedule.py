"""Whether transformers takes a schedule with its options: asked before the model is loaded, of the function itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import get_scheduler

from toolkit.errors import RecipeError, first_line

__all__ = ["require_rate", "require_schedule"]

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


def require_rate(arguments: Mapping[str, Any], examples: int) -> None:
    """Raise `RecipeError` where the one step that there is has a learning rate of 0, the first of a warm-up.

    Args:
        arguments: the recipe's training section.
        examples: of the training data, which bound the steps of an epoch; 0 where the model writes them itself.
    """
    batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    epochs = math.ceil(arguments["num_train_epochs"] * math.ceil(examples / batch))
    if (arguments["max_steps"] or epochs) != 1 or not arguments["warmup_steps"]:
        return
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    options = dict(arguments["lr_scheduler_kwargs"])
    warmup = math.ceil(arguments["warmup_steps"])
    try:
        made = get_scheduler(arguments["lr_scheduler_type"], optimizer, warmup, 1, scheduler_specific_kwargs=options)
    except (TypeError, ValueError, ArithmeticError):
        return
    if made.get_last_lr() == [0.0]:
        raise RecipeError(
            "training.warmup_steps: the learning rate of the only step would be 0, the first of a warm-up; "
            "set it to 0, or train for more steps"
        )
