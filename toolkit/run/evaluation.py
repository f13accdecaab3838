"""Base against adapted on what was held out: figures, the harm of rounded rows, and where tokens are routed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from toolkit.data import Batches, Dialogue
from toolkit.durable import write_text
from toolkit.evaluate import LOSS, Comparison, compare, expert_statistics, held_out_loss, reward_figures
from toolkit.plan import ROUNDED_ROWS, TRITON, Plan
from toolkit.recipe import PAIR_METRICS, REWARD
from toolkit.run.data import general_text, held_out, stop_as_trained
from toolkit.run.rewards import judged_answers
from toolkit.run_folder import RunFolder
from toolkit.steps import part
from toolkit.training.reference import kept_logps

__all__ = ["LOOKED_AT", "evaluate", "look_at_experts", "require_harmless_rounding"]

LOOKED_AT = 64
"""Examples on which the experts are watched, and training examples that stand in where none are held out."""


@part("evaluate")
def evaluate(model: PeftModel, tokenizer: PreTrainedTokenizerBase, batches: Batches, plan: Plan) -> Comparison | None:
    """Base against adapted on the held-out examples, or None where there are none or the recipe says no."""
    wanted, sequences = plan.recipe.eval, held_out(batches, plan)
    if not wanted.enabled or sequences is None:
        return None
    stop_as_trained(model.get_base_model(), batches.form)
    metric, pairs = wanted.metric, sequences if batches.pairs else None
    compared = compare(
        model,
        tokenizer,
        sequences if pairs is None else sequences.select(range(0, len(sequences), 2)),
        batches.held_out[: wanted.max_samples],
        metric=LOSS if metric in (*PAIR_METRICS, REWARD) else metric,
        general=general_text(tokenizer, plan),
        max_new_tokens=wanted.max_new_tokens,
        batch_size=wanted.batch_size,
        read=Dialogue(tokenizer, batches.form).judged,
        pairs=pairs,
    )
    if pairs is None:
        return judged_answers(compared, model, tokenizer, batches, plan)
    return _rewarded(compared, pairs, plan)


def _rewarded(compared: Comparison, pairs: Dataset, plan: Plan) -> Comparison:
    """The comparison with the rewards of the pairs, where the run folder has their reference."""
    reference = kept_logps(RunFolder(plan.folder).reference, pairs)
    if reference is None:
        return compared
    return replace(compared, rewards=reward_figures(compared.adapted.pairs, reference, plan.recipe.dpo.beta))


@part("look at experts")
def look_at_experts(model: PeftModel, batches: Batches, plan: Plan) -> dict[str, Any]:
    """Who was routed to with the adapter off and on, and how far each expert's adapter moved; kept in the run folder.

    Looked at are held-out examples, or training examples where none are held out.
    """
    sequences = held_out(batches, plan)
    examples = (batches.train if sequences is None else sequences)[:LOOKED_AT]["input_ids"]
    found = {"held_out": sequences is not None, **expert_statistics(model, examples)}
    write_text(RunFolder(plan.folder).experts, json.dumps(found))
    return found


def require_harmless_rounding(
    model: PeftModel, sequences: Dataset, batch_size: int, plain: str = TRITON, rounded: str = ROUNDED_ROWS
) -> None:
    """Raise `RecipeError` where int8 rows raise the loss on these examples too far; the model then computes with them.

    Args:
        sequences: rows of `input_ids` and `labels`. plain, rounded: the backends compared, by name.
    """
    from toolkit.ops.triton.w8a8 import compare_losses

    base = model.get_base_model()

    def loss_of(backend: str) -> float:
        base.set_experts_implementation(backend)
        return held_out_loss(model, sequences, batch_size)

    model.eval()
    compare_losses(loss_of, plain=plain, rounded=rounded).require()
