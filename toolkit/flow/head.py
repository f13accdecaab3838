"""The multi-token-prediction head of a run: made, opened again, and measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from toolkit.data import Batches
from toolkit.data.build import IGNORED
from toolkit.errors import RecipeError
from toolkit.evaluate import answer_ids, measure_drafts
from toolkit.mtp import (
    HeadTraining,
    MtpHead,
    can_speculate,
    learn_own_answers,
    load_native,
    native_keys,
    new_head,
    read_head,
)
from toolkit.plan import Plan
from toolkit.ranks import processes
from toolkit.steps import part

__all__ = ["evaluate_head", "make_head", "own_answers", "reopen_head", "step_tokens", "teach_own_answers"]


_DRAFTED, _DRAFTED_TOKENS = 24, 32
"""Held-out prompts that drafting is measured on, and the shortest text written after each."""
_OPENING = 16
"""Tokens of a text without a prompt that are given."""


def make_head(model: PeftModel, plan: Plan) -> HeadTraining | None:
    """The multi-token-prediction head that the recipe asks for, the checkpoint's own or a new one, and its training."""
    wanted, training = plan.recipe.mtp, plan.recipe.training
    if not wanted.enabled:
        return None
    if processes() > 1:
        raise RecipeError(
            "mtp.enabled: a head is trained in one process; start one, or train the head in a run of its own"
        )
    base = model.get_base_model()
    native = native_keys(plan.model, base.config, revision=plan.recipe.model.revision)
    head = (
        load_native(base, native)
        if native
        else new_head(base, num_mtp_layers=wanted.num_mtp_layers, seed=training.seed)
    )
    return HeadTraining(
        head,
        model,
        depth=max(wanted.depth, len(head.layers)),
        kind=wanted.loss,
        loss_weight=wanted.loss_weight,
        learning_rate=wanted.head_learning_rate,
        max_grad_norm=training.max_grad_norm,
    )


@part("teach the head")
def teach_own_answers(
    head: HeadTraining, tokenizer: PreTrainedTokenizerBase, batches: Batches, plan: Plan, console: Console
) -> None:
    """The finished model answers some of the training prompts, and the head learns from that."""
    prompts, answers = own_answers(head.model, tokenizer, batches, plan)
    steps = learn_own_answers(head, prompts, answers, tokens=step_tokens(plan), seed=plan.recipe.training.seed)
    console.print(f"multi-token-prediction head: {steps} steps on the model's own answers to {len(prompts)} prompts")


def own_answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, batches: Batches, plan: Plan
) -> tuple[list[list[int]], list[list[int]]]:
    """The first training prompts, as many as the recipe wants, and what the model as it stands answers greedily."""
    wanted, limits = plan.recipe.mtp.own_answers, plan.recipe.eval
    prompts = [_prompt(row) for row in batches.train.select(range(min(wanted, len(batches.train))))]
    model.eval()
    return prompts, answer_ids(
        model, tokenizer, prompts, max_new_tokens=limits.max_new_tokens, batch_size=limits.batch_size
    )


def step_tokens(plan: Plan) -> int:
    """Tokens of one batch of the run, padding included."""
    training = plan.recipe.training
    assert isinstance(training.max_length, int)
    return training.max_length * training.per_device_train_batch_size


def _prompt(row: Mapping[str, list[int]]) -> list[int]:
    """What stands before the first trained token; of text without a prompt, its first tokens."""
    first = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
    return row["input_ids"][: first or _OPENING]


def reopen_head(model: PeftModel, plan: Plan, artifact: str | Path) -> MtpHead:
    """The head of a finished artifact, for decoding.

    Raises:
        ModelError: it has none, the file is damaged, or it is the head of another base.
    """
    base = model.get_base_model()
    native = native_keys(plan.model, base.config, revision=plan.recipe.model.revision)
    return read_head(artifact, base, native)


def evaluate_head(
    model: PeftModel, head: MtpHead | None, batches: Batches, plan: Plan, console: Console | None = None
) -> dict[str, Any] | None:
    """Drafts of the head on held-out prompts, and of the checkpoint's own head as it was, before and after training.

    A native head that was not trained is measured too, and its loss of acceptance is said on the console.
    """
    base, recipe = model.get_base_model(), plan.recipe
    prompts = [question.prompt_ids for question in batches.held_out[: recipe.eval.max_samples][:_DRAFTED]]
    native = native_keys(plan.model, base.config, revision=recipe.model.revision)
    if not prompts or not recipe.eval.enabled or can_speculate(base) or (head is None and native is None):
        return None
    length = max(_DRAFTED_TOKENS, recipe.eval.max_new_tokens)
    count = max(recipe.mtp.depth, len(head.layers) if head else 1)
    measured: dict[str, Any] = {}
    if native is not None:
        stale = load_native(base, native).to(model.dtype).eval()
        for name, adapted in (("base", False), ("stale", True)):
            found = measure_drafts(model, stale, prompts, count=count, max_new_tokens=length, adapted=adapted)
            measured[name] = found.to_dict()
    if head is not None:
        measured["trained"] = measure_drafts(model, head, prompts, count=count, max_new_tokens=length).to_dict()
    elif console is not None:
        before, after = measured["base"], measured["stale"]
        console.print(
            "warning: this checkpoint's multi-token-prediction head no longer fits the adapted model: "
            f"{after['tau']:.2f} tokens a pass, {before['tau']:.2f} before; of first drafts "
            f"{after['acceptance'].get('1', 0):.0%} accepted, {before['acceptance'].get('1', 0):.0%} before; "
            "mtp.enabled=true trains it along"
        )
    return measured
