"""Public benchmarks, base against adapted, by lm-evaluation-harness itself; only its model is ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from toolkit.errors import RecipeError, first_line

__all__ = ["require_harness", "run_harness"]

Figures = dict[str, dict[str, float]]
"""Task to metric (`acc,none` is its `acc` without a filter) to value."""


def require_harness() -> None:
    """Raise `RecipeError` where lm-eval is not installed."""
    if not find_spec("lm_eval"):
        raise RecipeError('--lm-eval: lm-eval is not installed; pip install "onecard[lm-eval]"')


def run_harness(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Figures]:
    """`base` and `adapted` on these tasks.

    Args:
        tasks: names that lm-eval knows, or that YAML files in `folder` define. limit: examples of each.

    Raises:
        RecipeError: there is no such task, or its data cannot be had.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise RecipeError(f"--lm-eval: lm-eval has no task {unknown[0]}; `lm-eval ls tasks` lists them")
    model.eval()
    # PEFT puts its layers into the base model in place; switching them off switches the harness's model too.
    arguments = (model.get_base_model(), tokenizer, list(tasks), manager, limit, batch_size)
    with model.disable_adapter():
        base = _evaluate(*arguments)
    return {"base": base, "adapted": _evaluate(*arguments)}


def _evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    manager: Any,
    limit: int | None,
    batch_size: int,
) -> Figures:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            harness_model, tasks=tasks, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=0
        )
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        raise RecipeError(f"--lm-eval: {', '.join(tasks)}: {type(error).__name__}: {first_line(error)}") from None
    return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Figures without the names and the errors beside them, which no bootstrap was run for."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and "_stderr" not in name and "," in name
    }
