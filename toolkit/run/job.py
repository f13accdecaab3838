"""The main job as one function: what `onecard train RECIPE` does, from a recipe to a finished folder.

Each step takes frozen values and gives one; only the model changes, and only in `compensate`, `attach` and `train`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from toolkit.artifact import check_token
from toolkit.data import Batches
from toolkit.durable import write_text
from toolkit.plan import Plan, choose_device, make_plan
from toolkit.processes import StopRequest, broadcast, first_one_first, is_first, join, require_all_started
from toolkit.quant.gptq.calibrate import Compensation
from toolkit.recipe import Recipe
from toolkit.report import terminal as show
from toolkit.report.plans import show_plan
from toolkit.run.data import build_batches, check_tokens, load_tokenizer, record_form, step_shape
from toolkit.run.folder import (
    check_folder_is_ours,
    check_writable,
    copy_start,
    fork_recipe,
    open_run,
    owned,
    with_decided,
)
from toolkit.run.mixture import Chosen, choose_stacks, kept_mixture
from toolkit.run.model import attach, check_adapter, compensate, coverage, left_out_by_start, load, requantised
from toolkit.run.rewards import require_fork_of_base
from toolkit.run.trained import Trained, find_checkpoint, judge, package, require_packageable, train
from toolkit.run.vocabulary import require_seen
from toolkit.run_folder import RunFolder
from toolkit.steps import listening, seconds_by_part
from toolkit.training.memory import anonymous_memory
from toolkit.training.schedule import require_rate, require_schedule

__all__ = ["Finished", "run"]


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder, the artifact in it, and what `summary.json` says; other processes than the
    first have no summary."""

    folder: Path
    adapter: Path
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class _Prepared:
    """What is known before the model is loaded."""

    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    batches: Batches
    fork_of: RunFolder | None
    replan: Callable[..., Plan]
    """The same plan once more, with `stacks`."""
    other_versions: bool


def run(
    recipe: Recipe,
    *,
    fork: bool = False,
    other_versions: bool = False,
    console: Console | None = None,
    stop: StopRequest | None = None,
) -> Finished:
    """Fine-tune as the recipe says; called again with the same recipe, it goes on from the last checkpoint.

    Args:
        recipe: as `load_recipe` reads it.
        fork: start a new run from the weights of the one in the recipe's folder.
        other_versions: go on with a run that was begun under other minor versions of onecard and of the libraries.
        console: where progress and tables go; nowhere by default.
        stop: ends the run at the next step, saved; `toolkit.processes.signals_heeded` makes one of SIGTERM and SIGINT.

    Raises:
        OnecardError: of the kind that the command's exit codes tell.
    """
    console = console or Console(quiet=True)
    note = _once(console)
    with listening(console), ExitStack() as held:
        prepared = _prepare(recipe, fork, other_versions, note)
        folder = RunFolder(prepared.plan.folder)
        summary = broadcast(partial(_open, prepared, held, note))
        if summary is None:
            summary = _finish(prepared, console, stop, note)
        else:
            console.print(
                f"{folder.path}: already finished; set training.output_dir to another folder to train again",
                markup=False,
            )
    return Finished(folder.path, folder.adapter, summary)


def _prepare(recipe: Recipe, fork: bool, other_versions: bool, note: Callable[[str], None]) -> _Prepared:
    """Plan, tokenise, and plan again for the sequences there are; all that can be refused by then is."""
    require_all_started()
    require_schedule(recipe.training.lr_scheduler_type, recipe.training.lr_scheduler_kwargs)
    source = RunFolder(Path(recipe.training.output_dir))
    check_writable(source.path)
    recipe = with_decided(recipe)
    if fork:
        require_fork_of_base(recipe)
        recipe = fork_recipe(recipe)
    if recipe.hub.push_to_hub:
        check_token(recipe.hub.hub_token)
    undecided = "auto" in (recipe.lora.r, recipe.training.max_length)
    first = make_plan(recipe, for_training=undecided)
    if not fork:  # whose start is the run's own adapter, copied later
        check_adapter(first)
    check_tokens(first)
    tokenizer = load_tokenizer(first)
    require_packageable(tokenizer, first)
    batches = build_batches(tokenizer, first)
    require_rate(recipe.training.model_dump(), 0 if batches.questions else len(batches.train))
    require_seen(tokenizer, batches, first, note)
    device = choose_device(use_cpu=recipe.training.use_cpu)
    shape = step_shape(batches, first)
    found = kept_mixture(RunFolder(first.folder).mixture, first, batches) if first.choice else None
    plan = make_plan(recipe, device=device, shape=shape, stacks=found.stacks if found else None)
    if plan.recipe.training.packing != first.recipe.training.packing:  # the longest example counts, not a full sequence
        shape = step_shape(batches, plan)
        plan = make_plan(recipe, device=device, shape=shape, stacks=found.stacks if found else None)
    check_folder_is_ours(plan.folder)
    join(plan.device)
    replan = partial(make_plan, plan.recipe, device=device, shape=shape)
    return _Prepared(plan, tokenizer, batches, source if fork else None, replan, other_versions)


def _open(prepared: _Prepared, held: ExitStack, note: Callable[[str], None]) -> dict[str, Any] | None:
    """Take the run folder, which is `held` from now on; the summary, where the run in it is finished."""
    plan = prepared.plan
    held.enter_context(owned(plan.folder))
    folder = open_run(plan.folder, plan.recipe, note)
    record_form(folder, prepared.batches.form)
    if prepared.fork_of:
        copy_start(folder, prepared.fork_of)
    return folder.read_summary()


def _finish(
    prepared: _Prepared, console: Console, stop: StopRequest | None, note: Callable[[str], None]
) -> dict[str, Any]:
    """Everything from the loaded model to the summary; empty in other processes than the first."""
    plan, batches = prepared.plan, prepared.batches
    folder = RunFolder(plan.folder)
    with first_one_first():
        allowed = prepared.other_versions
        checkpoint = find_checkpoint(plan, prepared.tokenizer, batches, note, other_versions=allowed)
    _write_plan(plan)
    show_plan(console, plan)
    plan.require_fit()
    before = anonymous_memory()
    show.data(console, batches.report)
    plan, chosen = _with_stacks(prepared, folder, console)
    model, tokenizer = load(plan)
    if added := requantised(model):
        show.requantised(console, added)
    if compensated := compensate(model, batches, plan, folder.compensated):
        show.compensation(console, compensated)
    adapted = attach(model, plan)
    show.reached(console, counts := coverage(adapted, plan))
    if left_out := left_out_by_start(counts, plan):
        note(f"note  {left_out}")
    trained = train(adapted, tokenizer, batches, plan, console, checkpoint, stop)
    judged = judge(trained, batches, plan, console)
    if not is_first():
        return {}
    # They import matplotlib: not before the first step.
    from toolkit.report.charts import run_pictures
    from toolkit.report.page import write_page

    artifact = package(judged, plan, run_pictures(folder.path))
    summary = _summarize(judged, plan, batches, artifact, compensated, before)
    summary["mixture"] = chosen.to_dict() if chosen else None
    text = json.dumps(summary, indent=2)
    write_page(folder.path, text)
    write_text(folder.summary, text)
    finished: dict[str, Any] = json.loads(text)
    return finished


def _with_stacks(prepared: _Prepared, folder: RunFolder, console: Console) -> tuple[Plan, Chosen | None]:
    """The plan with what its budget leaves open chosen, now or when the run began, and what that choice was."""
    plan, batches = prepared.plan, prepared.batches
    if plan.choice is None:
        chosen = kept_mixture(folder.mixture, plan, batches) if plan.stacks else None
    else:
        chosen = choose_stacks(plan, batches, folder.mixture)
        plan = prepared.replan(stacks=chosen.stacks)
        plan.require_fit()
        _write_plan(plan)
    if chosen:
        show.mixture(console, plan.mixture, chosen.gains)
    return plan, chosen


def _write_plan(plan: Plan) -> None:
    if is_first():
        write_text(RunFolder(plan.folder).plan, json.dumps(plan.to_dict(), indent=2))


def _once(console: Console) -> Callable[[str], None]:
    """Print a line, unless it was printed before: recipe and checkpoint may both tell of the same change."""
    said: set[str] = set()

    def note(line: str) -> None:
        if line not in said:
            said.add(line)
            console.print(line, highlight=False, markup=False)

    return note


def _summarize(
    result: Trained,
    made: Plan,
    batches: Batches,
    artifact: Path,
    compensated: Compensation | None = None,
    before: int = 0,
) -> dict[str, Any]:
    """The finished run as JSON: all that `summary` shows. `before`: the process's bytes before anything was loaded."""
    compared = result.comparison
    answers = zip(batches.held_out, compared.base.answers, compared.adapted.answers, strict=False) if compared else ()
    samples: list[dict[str, Any]] = [
        {"prompt": question.prompt_text, "wanted": question.answer, "base": base, "adapted": adapted}
        for question, base, adapted in answers
    ]
    if compared and compared.base.rewards and compared.adapted.rewards:
        pairs = zip(compared.base.rewards, compared.adapted.rewards, strict=True)
        samples = [
            {**sample, "rewards": {"base": base, "adapted": adapted}}
            for sample, (base, adapted) in zip(samples, pairs, strict=False)
        ]
    most = made.recipe.eval.num_samples
    changed = {"better": compared.better[:most], "worse": compared.worse[:most]} if compared else {}
    return {
        "artifact": str(artifact),
        "counts": result.counts,
        "results": result.results(),
        "training": vars(result.training),
        "seconds": seconds_by_part(),
        "memory": _memory(result, made, before),
        "compensation": compensated.to_dict() if compensated else None,
        "requantised": requantised(result.model),
        "data": batches.report.to_dict(),
        "samples": samples[:most],
        "changed": {how: [samples[index] for index in indexes] for how, indexes in changed.items()},
    }


def _memory(result: Trained, made: Plan, before: int) -> dict[str, int]:
    """Bytes planned and measured, without what Python and the libraries take; `slack`: the allocator's, as planned."""
    taken = before if made.device == "cpu" else 0
    training, evaluating = result.training.peak_memory - taken, max(0, result.evaluation_peak - taken)
    planned = {"planned": made.bytes.run, "slack": made.bytes.slack, "libraries": taken}
    return {**planned, "measured": max(training, evaluating), "training": training, "evaluating": evaluating}
