"""Base against adapted on what was held out: figures, the harm of rounded rows, and where tokens are routed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from toolkit.data import Batches, Dialogue
from toolkit.data.storage import count_trained, desirable
from toolkit.durable import write_text
from toolkit.evaluate import LOSS, Comparison, compare, expert_statistics, held_out_loss, reward_figures, unsure_end
from toolkit.plan import ROUNDED_ROWS, TRITON, Plan
from toolkit.recipe import PAIR_METRICS, REFERENCE_FREE, REWARD
from toolkit.run.data import general_text, held_out, stop_as_trained
from toolkit.run.rewards import judged_answers
from toolkit.run_folder import RunFolder
from toolkit.steps import part
from toolkit.training.preference import Pairs
from toolkit.training.reference import kept_logps
from toolkit.training.unpaired import answers_of

__all__ = ["LOOKED_AT", "evaluate", "look_at_experts", "require_harmless_rounding", "tell_unsure_end"]

LOOKED_AT = 64
"""Examples on which the experts are watched, and training examples that stand in where none are held out."""


@part("evaluate")
def evaluate(model: PeftModel, tokenizer: PreTrainedTokenizerBase, batches: Batches, plan: Plan) -> Comparison | None:
    """Base against adapted on the held-out examples, or None where there are none or the recipe says no."""
    wanted, sequences = plan.recipe.eval, held_out(batches, plan)
    if not wanted.enabled or sequences is None:
        return None
    stop_as_trained(model.get_base_model(), batches.form)
    metric, judged = wanted.metric, sequences if batches.judged else None
    compared = compare(
        model,
        tokenizer,
        sequences if judged is None else sequences.select(np.flatnonzero(desirable(sequences))),
        batches.held_out[: wanted.max_samples],
        metric=LOSS if metric in (*PAIR_METRICS, REWARD) else metric,
        general=general_text(tokenizer, plan),
        max_new_tokens=wanted.max_new_tokens,
        batch_size=wanted.batch_size,
        read=Dialogue(tokenizer, batches.form).judged,
        judged=judged,
    )
    if judged is None:
        return judged_answers(compared, model, tokenizer, batches, plan)
    return _rewarded(compared, judged, plan)


def tell_unsure_end(model: PeftModel, tokenizer: PreTrainedTokenizerBase, batches: Batches, plan: Plan) -> str | None:
    """One line where the trained model ends answers greedily and rarely when they are sampled; else None."""
    sequences, wanted = held_out(batches, plan), plan.recipe.eval
    if sequences is None or not wanted.enabled:
        return None
    found = unsure_end(model.eval(), sequences, batches.form.stop_token_ids, wanted.batch_size)
    if found is None:
        return None
    text = tokenizer.convert_ids_to_tokens(found[0])
    return (
        f"{text!r} has a probability of {found[1]:.2g} where answers end: sampled ones rarely do; its row may never "
        "have been learnt: list it in model.trained_tokens"
    )


def _rewarded(compared: Comparison, table: Dataset, plan: Plan) -> Comparison:
    """The comparison with the rewards of good and bad answers, where the run folder has their reference."""
    method, logps = plan.recipe.training.method, np.asarray(compared.adapted.logps)
    beta = getattr(plan.recipe, method).beta
    if method in REFERENCE_FREE:
        return replace(compared, rewards=reward_figures((beta * logps / count_trained(table)).tolist(), table))
    reference = _reference(table, plan)
    if reference is None:
        return compared
    return replace(compared, rewards=reward_figures((beta * (logps - reference)).tolist(), table))


def _reference(table: Dataset, plan: Plan) -> NDArray[np.float64] | None:
    """What the run's reference gave each row of the table, where the run folder has all of it."""
    kept, recipe = RunFolder(plan.folder).reference, plan.recipe
    if recipe.training.method == "dpo":
        known = kept_logps(kept, Pairs(table))
        return None if known is None else np.asarray(known).reshape(-1)
    together = recipe.training.per_device_train_batch_size
    answers = answers_of(table, together=together, loss_type=recipe.kto.loss_type)
    known = kept_logps(kept, answers)
    return None if known is None else np.asarray(known)[np.argsort(answers.order), 0]


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
