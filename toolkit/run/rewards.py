"""Rewards in a run: loaded before the work, asked while it trains, and of both models' answers at its end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from toolkit.artifact import fetch_adapter
from toolkit.artifact.manifest import file_entry
from toolkit.data import Batches, Dialogue
from toolkit.errors import RecipeError
from toolkit.evaluate import Comparison, Measured
from toolkit.evaluate.generate import AnswerWriter
from toolkit.mtp.head import MtpHead
from toolkit.plan import Plan
from toolkit.recipe import Recipe, keeps_start, rollout_options
from toolkit.rewards import COMPARING, Judge, Reward
from toolkit.run_folder import RunFolder
from toolkit.training.rollouts import Rollouts

__all__ = [
    "judged_answers",
    "require_answers",
    "require_fork_of_base",
    "require_rewards",
    "rewards_sha256",
    "rollouts_of",
    "start_sha256",
]


def _judge(recipe: Recipe) -> Judge:
    section = recipe.rewards
    rewards = [Reward(each.label, each.function, each.weight, each.options) for each in section.functions]
    return Judge(rewards, seconds=section.time_limit, memory=section.memory, columns=section.columns)


def require_rewards(recipe: Recipe) -> None:
    """Load the rewards once, before the work.

    Raises:
        RecipeError: one cannot be loaded, or the reference is not the base.
    """
    options = rollout_options(recipe)
    if options is None:
        return
    if options.beta and recipe.lora.adapter_name_or_path and recipe.training.method == "rloo" and not _forked(recipe):
        raise RecipeError(
            "rloo.beta: the reference is the base, and this run starts from an adapter: it would be drawn back to what "
            "the model was before that; set it to 0, or use training.method: grpo, which stays near the adapter"
        )
    judge = _judge(recipe)
    try:
        judge.start()
    finally:
        judge.close()


def require_answers(recipe: Recipe, batches: Batches) -> None:
    """Of rows that are prompts alone, require that nothing compares answers with a wanted one.

    Raises:
        RecipeError: a reward or the metric does.
    """
    if not batches.questions or batches.report.splits["train"].trained_tokens:
        return
    rewards = (f"rewards.functions: {each.function}" for each in recipe.rewards.functions if each.function in COMPARING)
    metrics = [f"eval.metric: {recipe.eval.metric}"] if recipe.eval.metric in _COMPARING else []
    if compares := [*rewards, *metrics]:
        raise RecipeError(
            f"{compares[0]} compares with a wanted answer, and the rows are prompts alone; name your column of answers "
            "with data.columns: {answer: COLUMN}, or take another"
        )


_COMPARING = ("exact_match", "token_f1", "rouge_l")
"""Metrics that do."""


def require_fork_of_base(recipe: Recipe) -> None:
    """Of a fork that has a reference, require that the run's own one can still be asked.

    Raises:
        RecipeError: it was another adapter than the fork starts from.
    """
    if keeps_start(recipe):
        raise RecipeError(
            "grpo.beta: the run's reference is the adapter that it began from, and a fork begins from another; start a "
            "new run with lora.adapter_name_or_path set to the run's adapter, which is then the reference"
        )


def start_sha256(recipe: Recipe) -> str | None:
    """A hash of the adapter that training starts from, where it is the reference of rewards; else None."""
    if not _from_start(recipe):
        return None
    weights = fetch_adapter(str(recipe.lora.adapter_name_or_path)) / "adapter_model.safetensors"
    return str(file_entry(weights)["sha256"])


def _forked(recipe: Recipe) -> bool:
    start, run = recipe.lora.adapter_name_or_path, RunFolder(Path(recipe.training.output_dir))
    return start is not None and Path(start) == run.start.absolute()


def _from_start(recipe: Recipe) -> bool:
    """Whether the reference is the adapter that training starts from; that of a fork is the base."""
    return keeps_start(recipe) and not _forked(recipe)


def rewards_sha256(recipe: Recipe, batches: Batches) -> str | None:
    """A hash of the files that rewards are in and of the columns that they see; None where there are no rewards."""
    if rollout_options(recipe) is None:
        return None
    digest = hashlib.sha256()
    for reward in recipe.rewards.functions:
        where = reward.function.rpartition(":")[0]
        for file in (where if where.endswith(".py") else "", reward.json_schema or ""):
            digest.update(Path(file).read_bytes() if file else b"-")
    for question in batches.questions if recipe.rewards.columns else ():
        digest.update(repr(sorted(question.columns.items())).encode())
    return digest.hexdigest()


@contextmanager
def rollouts_of(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    plan: Plan,
    head: MtpHead | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[Rollouts | None]:
    """What the trainer is told, where the recipe's model writes answers; the rewards' process ends with the block.

    Args:
        head: drafts them. note: is told what this family does not allow.
    """
    options = rollout_options(plan.recipe)
    if options is None:
        yield None
        return
    told, judge = options.model_dump(), _judge(plan.recipe)
    writer = AnswerWriter(model, tokenizer, told, head=head, count=plan.recipe.mtp.depth, note=note)
    try:
        yield Rollouts(
            plan.recipe.training.method,
            told,
            judge,
            batches.questions,
            batches.held_out_questions[: plan.recipe.eval.max_samples],
            write=writer,
            read=Dialogue(tokenizer, batches.form).judged,
            decode=partial(tokenizer.decode, skip_special_tokens=True),
            figures=writer.figures,
            from_start=_from_start(plan.recipe),
            share=options.sharing(plan.recipe.training),
        )
    finally:
        judge.close()


def judged_answers(
    compared: Comparison, model: PeftModel, tokenizer: PreTrainedTokenizerBase, batches: Batches, plan: Plan
) -> Comparison:
    """The comparison with the rewards of both models' answers, and their tokens; as it is without rewards."""
    with rollouts_of(model, tokenizer, batches, plan) as rollouts:
        if rollouts is None:
            return compared
        base, adapted = (_judged(side, rollouts) for side in (compared.base, compared.adapted))
        return replace(compared, base=base, adapted=adapted)


def _judged(measured: Measured, rollouts: Rollouts) -> Measured:
    numbers = [-1 - n for n in range(len(measured.written))]
    judge, state = rollouts.judge, {"global_step": 0, "max_steps": 0, "epoch": 0.0}
    scores = judge.score(rollouts.asked(numbers, measured.written, state))
    if scores.failures:
        return measured
    totals = _known(judge.total(scores))
    lengths = [len(ids) for ids in measured.written]
    figures: dict[str, Any] = {"reward": _mean(totals)} if totals else {}
    for reward, values in zip(judge.rewards, scores.values, strict=True):
        if known := _known(values):
            figures[f"reward {reward.name}"] = _mean(known)
    figures["answer tokens"] = _mean(lengths)
    ranks = [0.0 if total is None else total for total in judge.total(scores)]
    names = [reward.name for reward in judge.rewards]
    each = [dict(zip(names, values, strict=True)) for values in zip(*scores.values, strict=True)]
    return replace(measured, figures={**measured.figures, **figures}, scores=tuple(ranks), rewards=each)


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
