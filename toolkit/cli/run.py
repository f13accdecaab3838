"""Verbs that make runs: train, sweep, plan, preview."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.options import (
    Json,
    Overrides,
    RecipePath,
    complete_field,
    emit,
    load_recipe,
    next_commands,
    plain_console,
    quiet_console,
)

if TYPE_CHECKING:
    from rich.console import Console

    from toolkit.recipe import Recipe
    from toolkit.sweep import Outcome

__all__ = ["plan", "preview", "sweep", "train"]


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    fork: Annotated[bool, typer.Option("--fork", help="Start a new run from the existing run's weights.")] = False,
    other_versions: Annotated[
        bool,
        typer.Option("--other-versions", help="Go on with a run that other minor versions of the libraries began."),
    ] = False,
    json_: Json = False,
) -> None:
    """The main job: plan, load, attach, train, compare, package. Rerun the same command to resume."""
    parsed = load_recipe(recipe, overrides, plain_console())
    from toolkit.artifact import push_artifact
    from toolkit.processes import is_first, signals_heeded
    from toolkit.report import terminal as show
    from toolkit.run.job import run

    console = quiet_console()
    with signals_heeded() as stop:
        finished = run(parsed, fork=fork, other_versions=other_versions, console=console, stop=stop)
        if not is_first():
            return
        show.summary(console, finished.summary)
        artifact = finished.summary["artifact"]
        folder = Path(artifact).parent
        next_commands(
            console,
            ["chat", folder, "--compare"],
            ["verify", artifact],
            ["report", folder],
            ["push", artifact, "OWNER/NAME"],
        )
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
            given = [recipe, *(overrides or [])]
            next_commands(console, *((["preview", *given], ["train", *given]) if is_recipe else (_init(recipe),)))
            return
        found = take_stock(parsed.model.model_name_or_path, revision=parsed.model.revision)
    show_audit(console, found)
    next_commands(console, ["plan", recipe], *([] if is_recipe else [_init(recipe)]))
    emit(found.to_dict(), json_)


_DEFAULTS = "model: {{model_name_or_path: {!r}}}\ndata: {{train: none}}\n"
"""A recipe of nothing but defaults."""


def _init(model: str) -> list[str]:
    """Words of the command that writes a recipe for a model."""
    return ["init", "recipe.yaml", "--model", model, "--data", "EXAMPLES"]


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
    job.check_tokens(made)
    tokenizer = job.load_tokenizer(made)
    batches = job.build_batches(tokenizer, made)
    render_preview(console, batches, tokenizer, count)
    given = [recipe, *(overrides or [])]
    next_commands(console, ["plan", *given], ["train", *given])
    emit(batches.report.to_dict(), json_)


def sweep(
    recipe: RecipePath,
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="SECTION.KEY=A,B...", help="Values to try (or one to fix).", autocompletion=complete_field
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the runs; default: training.output_dir-sweep.")] = None,
    metric: Annotated[str | None, typer.Option(help="The figure that ranks the trials; else loss, or reward.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Trials together; else one a card, or one.")] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster (auto, or ray://HOST:10001); else here.")] = None,
    json_: Json = False,
) -> None:
    """Train a recipe with every combination of some values. Rerun the same command to finish the rest."""
    from toolkit.recipe import PAIR_METRICS, PREFERENCE_METHODS, REWARD, ROLLOUTS
    from toolkit.sweep.grid import expand

    trials = expand(overrides)
    parsed = load_recipe(recipe, list(trials[0].overrides), plain_console())
    judges = parsed.training.method in PREFERENCE_METHODS
    pairs = ["preference_accuracy", *PAIR_METRICS] if judges else []
    metric = metric or (REWARD if parsed.training.method in ROLLOUTS else "loss")
    _check_metric(metric, parsed, pairs)
    import torch

    from toolkit.durable import write_text
    from toolkit.errors import ModelError
    from toolkit.sweep import Sweep, best_first, draw, run_trials
    from toolkit.sweep.picture import table

    console = quiet_console()
    folder = out or Path(f"{parsed.training.output_dir}-sweep")
    planned = Sweep(recipe.resolve(), tuple(trials), folder.resolve())
    cards = 0 if parsed.training.use_cpu else torch.cuda.device_count()
    console.print(f"{len(trials)} trials, runs under {folder}", markup=False)
    outcomes = run_trials(
        planned,
        at_once=at_once or max(1, cards),
        cards=min(1, cards),
        address=address,
        told=lambda outcome: _tell(console, outcome, metric),
    )
    ranked = best_first(outcomes, metric)
    found = {"metric": metric, "trials": [outcome.to_dict() for outcome in ranked]}
    write_text(folder / "sweep.json", json.dumps(found, indent=2))
    draw(outcomes, metric, folder / "sweep.svg")
    table(console, ranked, metric)
    console.print(f"{folder / 'sweep.json'}, {folder / 'sweep.svg'}", markup=False)
    if ranked[0].figures:
        next_commands(console, ["report", ranked[0].run], ["chat", ranked[0].run, "--compare"])
    emit(found, json_)
    if failed := [outcome for outcome in outcomes if outcome.error]:
        raise ModelError(
            f"{len(failed)} of {len(trials)} trials failed, {failed[0].trial.name} first; look into {folder / 'logs'} "
            "and rerun the same command"
        )


_FIGURES = ["loss", "exact_match", "token_f1", "rouge_l", "json_valid"]


def _check_metric(metric: str, recipe: Recipe, pairs: list[str]) -> None:
    """Raise `RecipeError` unless trials will have this figure."""
    from toolkit.errors import RecipeError, did_you_mean

    known = [
        *_FIGURES,
        *pairs,
        recipe.eval.metric.rpartition(":")[2],
        *(["perplexity"] if recipe.eval.regression else []),
    ]
    if metric not in known:
        hint = did_you_mean(metric, known) or f"; known: {', '.join(dict.fromkeys(known))}"
        raise RecipeError(f"--metric {metric}: no trial will have that figure{hint}")
    data = recipe.data
    holds_out = data.validation or data.validation_size or data.validation_split
    if metric != "loss" and not (holds_out and recipe.eval.enabled):
        lacks = (
            "the recipe holds out no examples; add data.validation_size=0.1" if not holds_out else "set eval.enabled"
        )
        raise RecipeError(f"--metric {metric}: is measured on held-out examples: {lacks}")


def _tell(console: Console, outcome: Outcome, metric: str) -> None:
    """One line as a trial ends."""
    value = outcome.figures.get(metric)
    shown = f"{metric} {value:.4f}" if value is not None else outcome.error or f"has no {metric}"
    console.print(f"{outcome.trial.name}: {shown}", markup=False)
