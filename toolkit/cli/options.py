"""What several verbs share: their arguments, the console, the recipe, a run opened again, what to type next."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.processes import is_first

if TYPE_CHECKING:
    from rich.console import Console

    from toolkit.plan import Plan
    from toolkit.recipe import Recipe

__all__ = [
    "Base",
    "Dtype",
    "Json",
    "Overrides",
    "RecipePath",
    "RunPath",
    "artifact_of",
    "complete_field",
    "emit",
    "load_recipe",
    "next_commands",
    "opened_as",
    "plain_console",
    "quiet_console",
    "reopen",
    "run_of",
]


def complete_field(incomplete: str) -> list[str]:
    """What the shell offers for an override: `section.key=`, and its words where there are only a few."""
    from toolkit.recipe import field_words

    return [each for each in field_words(incomplete.partition("=")[0]) if each.startswith(incomplete)]


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe YAML.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Override the recipe.", autocompletion=complete_field),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Base = Annotated[str | None, typer.Option(help="The base checkpoint, if the one the artifact names is not here.")]
Dtype = Annotated[
    str | None, typer.Option(help="Compute in float32, bfloat16 or float16; by default as the run was trained.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or an artifact.")]


def quiet_console() -> Console:
    """A console on stderr that tells which part is at work; mute in all processes of a run but the first.

    The bars are ours, of the parts' own counts. Of other libraries only the Hub's client draws, on a terminal, where it
    sends or takes something of its own accord.
    """
    import datasets
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    from toolkit.steps import listen

    console = plain_console()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    if not console.is_terminal:
        disable_progress_bars()
    listen(console)
    return console


def plain_console() -> Console:
    """A console on stderr where no library has anything to say; none is imported."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_first())


def load_recipe(path: Path, overrides: list[str] | None, console: Console) -> Recipe:
    """The recipe at `path` with overrides; what was translated or corrected is told on the console."""
    from toolkit.recipe import load

    return load(path, overrides or (), note=lambda line: console.print(f"note: {line}", markup=False))


def emit(value: Any, wanted: bool) -> None:
    """Print `value` as JSON to stdout where a program asked for it."""
    if wanted:
        print(json.dumps(value, indent=2))


def artifact_of(path: Path | str) -> Path:
    """A run's artifact, or the artifact itself; downloaded where it is `hf://owner/name`."""
    path = _fetched(path)
    return path / "adapter" if (path / "adapter" / "adapter_config.json").is_file() else path


def run_of(path: Path) -> Path | None:
    """The run that this is, or whose adapter it is."""
    run = path.parent if path.name == "adapter" and not (path / "recipe.yaml").is_file() else path
    return run if (run / "recipe.yaml").is_file() else None


def opened_as(path: Path | str, base: str | None = None) -> list[str]:
    """The words after a verb that open this run or artifact again, its base included where nothing else names it."""
    from toolkit.artifact import read_manifest

    if base:
        return [str(path), "--base", base]
    if run := run_of(Path(path)):
        return [str(run)]
    is_local = read_manifest(artifact_of(path))["base"]["revision"] is None
    return [str(path), *(["--base", "BASE"] if is_local else [])]


def _fetched(path: Path | str) -> Path:
    """A `Path` has lost one slash of `hf://`."""
    name = re.sub(r"^hf:/+", "hf://", str(path))
    if not name.startswith("hf://"):
        return Path(path)
    from toolkit.artifact import fetch_adapter

    return fetch_adapter(name)


_OPEN = ("data.", "eval.", "model.", "placement.", "quantization.error_compensation", "training.max_length")
_OPEN_TOO = ("training.use_cpu", "training.packing")


def _refuse_what_was_trained(overrides: list[str]) -> None:
    """Raise `RecipeError` for an override that a finished adapter cannot follow."""
    from toolkit.errors import RecipeError

    for override in overrides:
        if "." in override.partition("=")[0] and not override.startswith((*_OPEN, *_OPEN_TOO)):
            key = override.partition("=")[0]
            raise RecipeError(f"{key}: was decided by training; here data.*, eval.* and model.* can be given")


def reopen(
    path: Path, overrides: list[str] | None, base: str | None, console: Console, *, as_trained: bool = False
) -> tuple[Plan, Any, Any]:
    """The plan, adapted model and tokenizer of a run folder or artifact."""
    from toolkit import run as job
    from toolkit.artifact import reopen_recipe
    from toolkit.plan import make_plan

    _refuse_what_was_trained(overrides or [])
    path = _fetched(path)
    recipe = reopen_recipe(path, overrides or [], base, note=lambda line: console.print(f"note: {line}", markup=False))
    made = make_plan(recipe, for_training=False)
    model, tokenizer = job.reopen(made, artifact_of(path), as_trained=as_trained)
    return made, model, tokenizer


def _program() -> list[str]:
    """How this process was started, to be typed again."""
    if Path(sys.argv[0]).name == "__main__.py":
        return [os.path.relpath(sys.executable), "-m", "toolkit"]
    return [os.path.relpath(sys.argv[0])]


def next_commands(console: Console, *commands: Sequence[object]) -> None:
    """Show commands by their words, without the program's name, under a heading, as a shell takes them.

    Whoever ran a path gets that path again.
    """
    program = ["onecard"] if shutil.which("onecard") else _program()
    console.print("[bold]next[/bold]")
    for command in commands:
        console.print(f"  {shlex.join([*program, *map(str, command)])}", markup=False)
