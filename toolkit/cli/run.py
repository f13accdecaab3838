"""Verbs that make a run: train, plan, preview."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.options import Json, Overrides, RecipePath, emit, load_recipe, plain_console, quiet_console
from toolkit.report.hints import next_commands

__all__ = ["plan", "preview", "train"]


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    fork: Annotated[bool, typer.Option("--fork", help="Start a new run from the weights of the one there.")] = False,
    json_: Json = False,
) -> None:
    """The main job: plan, load, attach, train, compare, package. Rerun the same command to resume."""
    parsed = load_recipe(recipe, overrides, plain_console())
    from toolkit.artifact import push_artifact
    from toolkit.ranks import is_first
    from toolkit.report import terminal as show
    from toolkit.run.job import run
    from toolkit.signals import signals_heeded

    console = quiet_console()
    with signals_heeded() as stop:
        finished = run(parsed, fork=fork, console=console, stop=stop)
        if not is_first():
            return
        show.summary(console, finished.summary)
        emit(finished.summary, json_)
        if parsed.hub.push_to_hub:
            target = str(parsed.hub.hub_model_id)
            private, token = parsed.hub.hub_private_repo, parsed.hub.hub_token
            print(push_artifact(finished.adapter, target, private=private, token=token))


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
