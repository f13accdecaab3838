"""The data of a run: its tokenizer, its masked examples, and the longest of them, which decide what a step takes."""

from __future__ import annotations

import datetime
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from toolkit.data import Batches, read_chat_template
from toolkit.data import build_batches as build_from_rows
from toolkit.data.storage import count_trained, sequence_lengths
from toolkit.errors import ModelError, first_line
from toolkit.evaluate import LOSS, find_metric
from toolkit.plan import Plan, StepShape
from toolkit.run.chat_form import declared_stops, recorded_form
from toolkit.run.evaluation import general_text, held_out
from toolkit.run.mtp import own_prompts
from toolkit.steps import part

__all__ = ["build_batches", "load_tokenizer", "step_shape"]


def load_tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with the recipe's chat template where it names one."""
    recipe = plan.recipe
    try:
        tokenizer = AutoTokenizer.from_pretrained(plan.model, revision=recipe.model.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{plan.model}: no usable tokenizer: {first_line(error)}") from None
    if recipe.data.chat_template_path:
        tokenizer.chat_template = read_chat_template(Path(recipe.data.chat_template_path))
    result: PreTrainedTokenizerBase = tokenizer
    return result


@part("tokenise")
def build_batches(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Batches:
    """The recipe's examples, validated and masked; TRL packs them. What evaluation needs is tried, too.

    Raises:
        DataError: the examples or the general text cannot be used. RecipeError: there is no such metric.
    """
    general_text(tokenizer, plan)
    if plan.recipe.eval.metric != LOSS:
        find_metric(plan.recipe.eval.metric)
    data = plan.recipe.data.model_dump(exclude={"chat_template_path"})
    training = plan.recipe.training
    recorded = recorded_form(plan.folder)
    return build_from_rows(
        tokenizer,
        **data,
        max_length=plan.max_length,
        seed=training.seed,
        stop_token_ids=declared_stops(plan),
        date=datetime.date.fromisoformat(recorded.date) if recorded and recorded.date else None,
    )


def step_shape(batches: Batches, plan: Plan) -> StepShape:
    """The longest training sequence and its labels, packed or not; of packed ones a bound, since TRL packs later.

    Of what is held out, the longest sequence that is looked at, the most labels of one, and the longest prompt, or that
    of the prompts which the model answers for its head.
    """
    training = plan.recipe.training
    lengths, labels = sequence_lengths(batches.train), count_trained(batches.train)
    looked_at = held_out(batches, plan)
    others = [] if looked_at is None else [int(f(looked_at).max()) for f in (sequence_lengths, count_trained)]
    questions = batches.held_out[: plan.recipe.eval.max_samples] if plan.recipe.eval.enabled and others else ()
    prompts = [len(question.prompt_ids) for question in questions] + list(map(len, own_prompts(batches, plan)))
    beside = (*(others or (0, 0)), max(prompts, default=0))
    longest = int(lengths.max())
    if not training.packing:
        one = training.per_device_train_batch_size == 1
        return StepShape(longest, int(labels.max()) if one else longest, *beside)
    length = min(plan.max_length, int(lengths.sum()))
    return StepShape(length, _most_labels(lengths, labels, length), *beside)


def _most_labels(lengths: NDArray[np.int64], labels: NDArray[np.int64], room: int) -> int:
    """A bound on the labels in one packed sequence of `room` tokens: of the rows that are labelled most densely."""
    share = labels / lengths
    order = np.lexsort((lengths, share))[::-1]
    taken = np.diff(np.minimum(np.cumsum(lengths[order]), room), prepend=0)
    return max(1, math.ceil(float((share[order] * taken).sum())))
