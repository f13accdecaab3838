"""Verbs before a run: quantize, schema, init, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli.options import Json, emit, load_recipe, quiet_console

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["doctor", "init", "quantize", "schema"]


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or owner/name on the Hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the Hub.")] = "main",
    recipe: Annotated[Path | None, typer.Option(help="Compensate rounding errors on this recipe's examples.")] = None,
    json_: Json = False,
) -> None:
    """Write an int8 checkpoint, one layer in memory at a time; it loads at disk speed, here and in transformers.

    With a recipe, the int8 model is in memory too, and the checkpoint is used with error_compensation: none.
    """
    from toolkit.quant import quantize_checkpoint, refuse_existing

    console = quiet_console()
    refuse_existing(out)
    compensated = _compensated(recipe, model, revision, console) if recipe else None
    with console.status("reading") as status:
        options: dict[str, Any] = {"revision": revision, "compensated": compensated}
        done = quantize_checkpoint(model, out, **options, progress=lambda n, of: status.update(f"{n} of {of}"))
    console.print(f"{out}: {done.shards} shards, {done.source_bytes / 1e9:.2f} GB became {done.bytes / 1e9:.2f} GB")
    if done.left_out:
        console.print(f"note: {len(done.left_out)} tensors that the model does not use left out: {done.left_out[0]}, …")
    emit(done.to_dict(), json_)


def schema() -> None:
    """The recipe's JSON Schema."""
    from toolkit.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


def init(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented starter recipe."""
    from toolkit.errors import RecipeError
    from toolkit.recipe import starter

    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(starter(str(path)))
    except FileExistsError:
        raise RecipeError(f"{path}: is there already; give another name") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written ({error.strerror}); give another name") from None
    print(path)


def doctor(json_: Json = False) -> None:
    """What this machine has: card, memory, disk, versions."""
    from toolkit.report import terminal as show

    facts = show.machine()
    show.facts(quiet_console(), facts)
    emit(facts, json_)


def _compensated(recipe: Path, model: str, revision: str, console: Console) -> Any:
    """The checkpoint in int8, rounded with error feedback on a recipe's examples."""
    from toolkit import flow
    from toolkit.plan import make_plan
    from toolkit.report import terminal as show

    overrides = [f"model.model_name_or_path={model}", f"model.revision={revision}", "quantization.experts=int8"]
    overrides += ["quantization.linears=int8", "quantization.error_compensation=gptq"]
    made = make_plan(load_recipe(recipe, overrides, console), for_training=False)
    loaded, tokenizer = flow.load(made)
    if report := flow.compensate(loaded, flow.build_batches(tokenizer, made), made):
        show.compensation(console, report)
    return loaded
