"""Verbs before a run: quantize, schema, init, doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli.options import Json, emit, load_recipe, next_commands, plain_console, quiet_console

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["doctor", "init", "quantize", "schema"]


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or owner/name on the Hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the Hub.")] = "main",
    recipe: Annotated[Path | None, typer.Option(help="Compensate rounding errors on this recipe's examples.")] = None,
    experts: Annotated[str, typer.Option(help="What expert stacks are rounded to: int8, int4 or mxfp4.")] = "int8",
    budget: Annotated[str | None, typer.Option(help="With a recipe and int4: bytes of the stacks, as 16GiB.")] = None,
    json_: Json = False,
) -> None:
    """Write an int8 checkpoint, one layer in memory at a time; it loads at disk speed, here and in transformers.

    With a recipe, the int8 model is in memory too, and the checkpoint is used with error_compensation: none; the
    weights are then read twice, once to load and once to compensate, since each layer is calibrated behind the last.
    """
    from toolkit.checkpoint.unused import unused_lines
    from toolkit.errors import RecipeError
    from toolkit.quant import quantize_checkpoint, refuse_existing
    from toolkit.quant.stored import EXPERT_KINDS

    console = quiet_console()
    refuse_existing(out)
    if experts not in EXPERT_KINDS:
        raise RecipeError(f"--experts {experts}: give one of {', '.join(EXPERT_KINDS)}")
    if budget is not None and (recipe is None or experts != "int4"):
        raise RecipeError("--budget: needs --experts int4, and --recipe, on whose examples the loss is measured")
    compensated, stacks = _compensated(recipe, model, revision, console, experts, budget) if recipe else (None, None)
    done = quantize_checkpoint(model, out, revision=revision, compensated=compensated, experts=experts, stacks=stacks)
    console.print(
        f"{out}: {done.shards} shards, {done.source_bytes / 1e9:.2f} GB became {done.bytes / 1e9:.2f} GB", markup=False
    )
    for line in unused_lines(done.kept, done.left_out):
        console.print(f"note: {line}", highlight=False, markup=False)
    next_commands(console, ["plan", out, "--audit"], ["train", recipe or "RECIPE", f"model.model_name_or_path={out}"])
    emit(done.to_dict(), json_)


def schema() -> None:
    """The recipe's JSON Schema."""
    from toolkit.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))
    next_commands(plain_console(), ["init"])


def init(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="The file to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="A checkpoint folder or owner/name on the Hub.")] = None,
    data: Annotated[str | None, typer.Option(help="Training examples: a file, a folder or a Hub dataset.")] = None,
    card: Annotated[str | None, typer.Option(help="A card such as rtx-4090; without it, this machine.")] = None,
    json_: Json = False,
) -> None:
    """Write a commented recipe; with model and data, asked for on a terminal, one that plans successfully."""
    from toolkit.data import require_source
    from toolkit.errors import RecipeError
    from toolkit.plan import first_that_fits
    from toolkit.recipe import starter
    from toolkit.report.plans import show_plan

    if path.exists():
        raise RecipeError(f"{path}: already exists; give another name")
    if model is None and data is None and sys.stdin.isatty():
        model, data, card = _ask_for_recipe(card)
    if (model is None) != (data is None):
        raise RecipeError("init: --model and --data go together; without both a plain template is written")
    console = quiet_console()
    fields: dict[tuple[str, str], Any] = {}
    if model is not None and data is not None:
        require_source(data)
        fields, made = first_that_fits(model, data, card)
        show_plan(console, made)
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(starter(str(path), fields))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written ({error.strerror}); give another name") from None
    if json_:
        emit({"recipe": str(path), "fields": {".".join(key): value for key, value in fields.items()}}, json_)
    else:
        print(path)
    next_commands(console, *([verb, path] for verb in ("preview", "plan", "train")))


def _ask_for_recipe(card: str | None) -> tuple[str, str, str | None]:
    """Model, data and card, from the person at the terminal."""
    model = typer.prompt("Model (a folder, or owner/name on the Hub)", err=True)
    data = typer.prompt("Training examples (a .jsonl, .json, .csv or .parquet file, or a Hub dataset)", err=True)
    asked = card or typer.prompt("Card (such as rtx-4090; empty for this machine)", default="", err=True)
    return model, data, asked or None


def doctor(json_: Json = False) -> None:
    """What this machine has, what a run would use of it and why, and what would help."""
    from toolkit.report import machine

    found = machine.machine()
    console = quiet_console()
    machine.facts(console, found)
    next_commands(console, ["init"], ["train", "recipes/quickstart.yaml"])
    emit(found, json_)


def _compensated(
    recipe: Path, model: str, revision: str, console: Console, experts: str, budget: str | None
) -> tuple[Any, Mapping[str, str]]:
    """The checkpoint in int8, its experts perhaps in int4, rounded with error feedback on a recipe's examples.

    And what each expert stack is in, where a budget decides it.
    """
    from toolkit import run as job
    from toolkit.plan import make_plan
    from toolkit.report import terminal as show

    overrides = [f"model.model_name_or_path={model}", f"model.revision={revision}", f"quantization.experts={experts}"]
    overrides += ["quantization.linears=int8", "quantization.error_compensation=gptq"]
    overrides += [f"quantization.budget={'null' if budget is None else budget}"]
    parsed = load_recipe(recipe, overrides, console)
    made = make_plan(parsed, for_training=False)
    batches = job.build_batches(job.load_tokenizer(made), made)
    if made.choice is not None:
        chosen = job.choose_stacks(made, batches)
        made = make_plan(parsed, for_training=False, stacks=chosen.stacks)
        show.mixture(console, made.mixture, chosen.gains)
    loaded, _ = job.load(made)
    if report := job.compensate(loaded, batches, made):
        show.compensation(console, report)
    return loaded, made.stacks
