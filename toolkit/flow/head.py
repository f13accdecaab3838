"""The multi-token-prediction head of a run: made, opened again, and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console

from toolkit.data import Batches
from toolkit.errors import RecipeError
from toolkit.evaluate import measure_drafts
from toolkit.mtp import HeadTraining, MtpHead, can_speculate, load_native, native_keys, new_head, read_head
from toolkit.plan import Plan
from toolkit.ranks import processes

__all__ = ["evaluate_head", "make_head", "reopen_head"]


_DRAFTED, _DRAFTED_TOKENS = 24, 32
"""Held-out prompts that drafting is measured on, and the shortest text written after each."""


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
    prompts = [question.prompt_ids for question in batches.held_out[:_DRAFTED]]
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
        before, after = (measured[name]["tau"] for name in ("base", "stale"))
        console.print(
            f"warning: this checkpoint's multi-token-prediction head no longer fits the adapted model: {after:.2f} "
            f"tokens a pass, {before:.2f} before; mtp.enabled=true trains it along"
        )
    return measured
