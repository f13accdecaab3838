"""Verbs that make many runs: sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.options import Json, RecipePath, complete_field, emit, load_recipe, plain_console, quiet_console
from toolkit.report.hints import next_commands

if TYPE_CHECKING:
    from rich.console import Console

    from toolkit.sweep import Outcome

__all__ = ["sweep"]


def sweep(
    recipe: RecipePath,
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="SECTION.KEY=A,B...", help="Values to try; single ones hold.", autocompletion=complete_field
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; else training.output_dir with -sweep.")] = None,
    metric: Annotated[str, typer.Option(help="The figure that ranks the trials.")] = "loss",
    at_once: Annotated[int | None, typer.Option(min=1, help="Trials together; else one a card, or one.")] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster (auto, or ray://HOST:10001); else here.")] = None,
    json_: Json = False,
) -> None:
    """Train a recipe with every combination of some values. Rerun the same command to go on with what is not done."""
    from toolkit.sweep.grid import expand

    trials = expand(overrides)
    parsed = load_recipe(recipe, list(trials[0].overrides), plain_console())
    _check_metric(metric, parsed.eval.metric, parsed.eval.regression)
    import torch

    from toolkit.durable import write_text
    from toolkit.errors import ModelError
    from toolkit.sweep import Sweep, best_first, draw, run_trials
    from toolkit.sweep.picture import table

    console = quiet_console()
    folder = out or Path(f"{parsed.training.output_dir}-sweep")
    planned = Sweep(recipe.resolve(), tuple(trials), folder.resolve())
    cards = 0 if parsed.training.use_cpu else torch.cuda.device_count()
    console.print(f"{len(trials)} trials, runs under {folder}")
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
    console.print(f"{folder / 'sweep.json'}, {folder / 'sweep.svg'}")
    if ranked[0].figures:
        next_commands(console, f"report {ranked[0].run}", f"chat {ranked[0].run} --compare")
    emit(found, json_)
    if failed := [outcome for outcome in outcomes if outcome.error]:
        raise ModelError(
            f"{len(failed)} of {len(trials)} trials failed, {failed[0].trial.name} first; look into {folder / 'logs'} "
            "and rerun the same command"
        )


_FIGURES = ["loss", "exact_match", "token_f1", "rouge_l", "json_valid"]


def _check_metric(metric: str, chosen: str, regression: str | None) -> None:
    """Raise `RecipeError` unless trials will have this figure."""
    from toolkit.errors import RecipeError, did_you_mean

    known = [*_FIGURES, chosen.rpartition(":")[2], *(["perplexity"] if regression else [])]
    if metric not in known:
        hint = did_you_mean(metric, known) or f"; there are {', '.join(dict.fromkeys(known))}"
        raise RecipeError(f"--metric {metric}: no trial will have that figure{hint}")


def _tell(console: Console, outcome: Outcome, metric: str) -> None:
    """One line as a trial ends."""
    value = outcome.figures.get(metric)
    shown = f"{metric} {value:.4f}" if value is not None else outcome.error or f"has no {metric}"
    console.print(f"{outcome.trial.name}: {shown}", markup=False)
