"""Which layers of a run are int8 and which int4: measured once under the recipe's budget, then kept for each reopening.

The model in int4 is loaded for it and let go again; the run then loads the mixture as any checkpoint is loaded, so that
a resumed run and the first one have the same bits.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from toolkit.data import Batches
from toolkit.durable import write_text
from toolkit.errors import ModelError
from toolkit.plan import Plan
from toolkit.processes import first_one_first
from toolkit.quant.gains import Gains, measure_gains
from toolkit.quant.gptq.calibrate import calibration_examples
from toolkit.run.model import base_hash, get_ready, load_frozen, refuse_streamed_compensation
from toolkit.steps import part

__all__ = ["Chosen", "choose_stacks", "kept_mixture"]


@dataclass(frozen=True)
class Chosen:
    """What each expert stack is in, and the losses that say so."""

    stacks: Mapping[str, str]
    gains: Gains

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: what was measured."""
        return self.gains.to_dict()


@part("measure")
def choose_stacks(plan: Plan, batches: Batches, kept: Path | None = None) -> Chosen:
    """Measure the loss with each layer in int8 on training examples, and choose as many as the recipe's budget holds.

    What comes back goes into `make_plan(recipe, stacks=…)`, and that plan into `load`. Error compensation comes after.

    Args:
        kept: a file of `kept_mixture`; read where it is of this recipe, base and examples, written otherwise.

    Raises:
        ModelError: the plan leaves nothing to choose, or the model cannot be measured layer by layer.
        RecipeError: experts are streamed and to be compensated.
    """
    choice = plan.choice
    if choice is None:
        raise ModelError("quantization.budget: this plan leaves no layer to choose; load it as it is")
    refuse_streamed_compensation(plan)
    get_ready(plan)
    with first_one_first():
        if kept is not None and (found := kept_mixture(kept, plan, batches)) is not None:
            return found
        gains = _measured(plan, batches)
        chosen = Chosen(choice.kinds(gains.chosen), gains)
        if kept is not None:
            about = {"made_from": _made_from(plan, batches), "stacks": chosen.stacks, "measured": chosen.to_dict()}
            write_text(kept, json.dumps(about, indent=2))
        return chosen


def _measured(plan: Plan, batches: Batches) -> Gains:
    """With the model in int4 in memory, and gone again afterwards."""
    choice, asked = plan.choice, plan.recipe.quantization
    assert choice is not None
    plain = asked.model_copy(update={"budget": None, "error_compensation": "none"})
    recipe = plan.recipe.model_copy(update={"quantization": plain})
    model = load_frozen(replace(plan, recipe=recipe, choice=None))
    examples = _examples(plan, batches)
    gains = measure_gains(
        model, plan.model, examples, tuple(choice.extra), choice.by_gain, revision=plan.recipe.model.revision
    )
    del model
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    return gains


def kept_mixture(path: Path, plan: Plan, batches: Batches) -> Chosen | None:
    """What a run keeps of its choice; None where it keeps none, or it was made from something else."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        gains = Gains(**{**about["measured"], "chosen": tuple(about["measured"]["chosen"])})
        found, made_from = Chosen(dict(about["stacks"]), gains), about["made_from"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: damaged ({error}); remove it to measure again") from None
    try:
        return found if made_from == _made_from(plan, batches) else None
    except ModelError:  # the base is not here yet
        return None


def _examples(plan: Plan, batches: Batches) -> Any:
    return calibration_examples(batches.train[: plan.recipe.quantization.calibration_samples]["input_ids"])


def _made_from(plan: Plan, batches: Batches) -> str:
    """A hash of all that a choice follows from."""
    asked = plan.recipe.quantization.model_dump(include={"budget", "experts", "linears"})
    known = [base_hash(plan), asked, plan.dtype, plan.backend, [list(each) for each in _examples(plan, batches)]]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
