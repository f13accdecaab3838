"""Verbs that make a run: train, plan, preview."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli.options import Json, Overrides, RecipePath, emit, load_recipe, plain_console, quiet_console
from toolkit.report.hints import next_commands

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from toolkit.data import Batches
    from toolkit.plan import Plan
    from toolkit.recipe import Recipe
    from toolkit.run import RunFolder
    from toolkit.signals import StopRequest

__all__ = ["plan", "preview", "train"]


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    fork: Annotated[bool, typer.Option("--fork", help="Start a new run from the weights of the one there.")] = False,
    json_: Json = False,
) -> None:
    """The main job: plan, load, attach, train, compare, package. Rerun the same command to resume."""
    from toolkit.signals import signals_heeded

    with signals_heeded() as stop:
        parsed, run, console, finished = _main_job(recipe, overrides, fork, stop)
        _hand_over(parsed, run, console, finished, json_)


def _main_job(
    recipe: Path, overrides: list[str] | None, fork: bool, stop: StopRequest
) -> tuple[Recipe, RunFolder, Console, dict[str, Any] | None]:
    """Everything up to the finished run, and its summary."""
    parsed = load_recipe(recipe, overrides, plain_console())
    from toolkit import run as job
    from toolkit.artifact import check_token
    from toolkit.plan import make_plan
    from toolkit.ranks import broadcast, join
    from toolkit.run import RunFolder, check_folder_is_ours, check_writable, fork_recipe

    console = quiet_console()
    note = _once(console)
    check_writable(Path(parsed.training.output_dir))
    source = RunFolder(Path(parsed.training.output_dir))
    parsed = fork_recipe(parsed) if fork else parsed
    if parsed.hub.push_to_hub:
        check_token(parsed.hub.hub_token)
    undecided = "auto" in (parsed.lora.r, parsed.training.max_length)
    made = make_plan(parsed, for_training=undecided)
    tokenizer = job.load_tokenizer(made)
    job.require_packageable(tokenizer, made)
    batches = job.build_batches(tokenizer, made)
    made = make_plan(parsed, shape=job.step_shape(batches, made))
    check_folder_is_ours(made.folder)
    join(made.device)
    run = RunFolder(made.folder)
    with ExitStack() as held:
        finished = broadcast(partial(_open, made, batches, source if fork else None, held, note))
        if finished is None:
            finished = _train(console, made, batches, tokenizer, run, stop, note)
        else:
            console.print(f"{run.path}: already finished; set training.output_dir to another folder to train again")
    return parsed, run, console, finished


def _open(
    made: Plan, batches: Batches, fork_of: RunFolder | None, held: ExitStack, note: Callable[[str], None]
) -> dict[str, Any] | None:
    """Take the run folder, which is `held` from now on; the summary, where the run in it is finished."""
    from toolkit.run import copy_start, open_run, owned, record_form

    held.enter_context(owned(made.folder))
    run = open_run(made.folder, made.recipe, note)
    record_form(run, batches.form)
    if fork_of:
        copy_start(run, fork_of)
    return run.read_summary()


def _hand_over(parsed: Recipe, run: RunFolder, console: Console, finished: dict[str, Any] | None, json_: bool) -> None:
    """Show the summary, and push where the recipe says so; the first process alone."""
    from toolkit.ranks import is_first

    if finished is None or not is_first():
        return
    from toolkit.artifact import push_artifact
    from toolkit.report import terminal as show

    show.summary(console, finished)
    emit(finished, json_)
    if parsed.hub.push_to_hub:
        target = str(parsed.hub.hub_model_id)
        print(push_artifact(run.adapter, target, private=parsed.hub.hub_private_repo, token=parsed.hub.hub_token))


def _train(
    console: Console,
    made: Plan,
    batches: Batches,
    tokenizer: PreTrainedTokenizerBase,
    run: RunFolder,
    stop: StopRequest,
    note: Callable[[str], None],
) -> dict[str, Any] | None:
    """Everything from the loaded model to the summary; gives the summary in the first process."""
    from toolkit import run as job
    from toolkit.durable import write_text
    from toolkit.ranks import first_one_first, is_first
    from toolkit.report import terminal as show
    from toolkit.report.page import write_page
    from toolkit.report.pictures import run_pictures
    from toolkit.report.plans import show_plan
    from toolkit.training.memory import anonymous_memory

    with first_one_first():
        resumed = job.find_checkpoint(made, tokenizer, batches, note)
    if is_first():
        write_text(run.plan, json.dumps(made.to_dict(), indent=2))
    show_plan(console, made)
    made.require_fit()
    before = anonymous_memory()
    show.data(console, batches.report)
    model, tokenizer = job.load(made)
    if compensated := job.compensate(model, batches, made, run.compensated):
        show.compensation(console, compensated)
    model = job.attach(model, made)
    show.reached(console, job.coverage(model, made))
    result = job.train(model, tokenizer, batches, made, console, resumed, stop)
    if not is_first():
        return None
    packaged = job.package(result, made, run_pictures(run.path))
    finished: dict[str, Any] = show.summarize(result, made, batches, packaged, compensated, before)
    text = json.dumps(finished, indent=2)
    write_page(run.path, text)
    write_text(run.summary, text)
    return finished


def _once(console: Console) -> Callable[[str], None]:
    """Print a line, unless it was printed before: recipe and checkpoint may both tell of the same change."""
    said: set[str] = set()

    def note(line: str) -> None:
        if line not in said:
            said.add(line)
            console.print(line, highlight=False, markup=False)

    return note


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe YAML, or a model's folder or name.")],
    overrides: Overrides = None,
    audit: Annotated[bool, typer.Option("--audit", help="What the checkpoint is made of, from its headers.")] = False,
    device: Annotated[str | None, typer.Option(help="Plan for this card, e.g. rtx-4090, not for this machine.")] = None,
    memory: Annotated[str | None, typer.Option(help="Plan for a device of this size, e.g. 12GiB.")] = None,
    json_: Json = False,
) -> None:
    """What a run will load, adapt and need, from the config alone; exit code 5 where it does not fit."""
    from toolkit.plan import audit as take_stock
    from toolkit.plan import choose_device, make_plan
    from toolkit.recipe import parse
    from toolkit.report.plans import show_audit, show_plan

    console = plain_console()
    is_recipe = recipe.endswith((".yaml", ".yml"))
    if audit and not is_recipe:
        found = take_stock(recipe)
    else:
        parsed = (
            load_recipe(Path(recipe), overrides, console)
            if is_recipe
            else parse(_DEFAULTS.format(recipe), recipe, overrides or ())
        )
        if not audit:
            made = make_plan(parsed, device=choose_device(device, memory, use_cpu=parsed.training.use_cpu))
            show_plan(console, made)
            emit(made.to_dict(), json_)
            made.require_fit()
            given = " ".join([recipe, *(overrides or [])])
            next_commands(console, *((f"preview {given}", f"train {given}") if is_recipe else (_INIT.format(recipe),)))
            return
        found = take_stock(parsed.model.model_name_or_path, revision=parsed.model.revision)
    show_audit(console, found)
    next_commands(console, f"plan {recipe}", *([] if is_recipe else [_INIT.format(recipe)]))
    emit(found.to_dict(), json_)


_DEFAULTS = "model: {{model_name_or_path: {!r}}}\ndata: {{train: none}}\n"
"""A recipe of nothing but defaults."""
_INIT = "init recipe.yaml --model {} --data EXAMPLES"


def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=0, help="Examples shown.")] = 3,
    json_: Json = False,
) -> None:
    """The first examples as tokens with the loss mask, a length histogram, drop counts."""
    parsed = load_recipe(recipe, overrides, plain_console())
    from toolkit import run as job
    from toolkit.data import render_preview
    from toolkit.plan import make_plan

    console = quiet_console()
    made = make_plan(parsed, for_training=False)
    tokenizer = job.load_tokenizer(made)
    batches = job.build_batches(tokenizer, made)
    render_preview(console, batches, tokenizer, count)
    given = " ".join([str(recipe), *(overrides or [])])
    next_commands(console, f"plan {given}", f"train {given}")
    emit(batches.report.to_dict(), json_)
