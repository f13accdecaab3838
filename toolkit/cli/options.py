"""What several verbs share: their arguments, the console, the recipe, a run opened again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.ranks import is_first

if TYPE_CHECKING:
    from rich.console import Console

    from toolkit.plan import Plan
    from toolkit.recipe import Recipe

__all__ = [
    "Base",
    "Json",
    "Overrides",
    "RecipePath",
    "RunPath",
    "artifact_of",
    "emit",
    "load_recipe",
    "opened_as",
    "plain_console",
    "quiet_console",
    "reopen",
]

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe YAML.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Override the recipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Base = Annotated[str | None, typer.Option(help="The base checkpoint, where the artifact names none that is here.")]
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

    return load(path, overrides or (), note=lambda line: console.print(f"note: {line}"))


def emit(value: Any, wanted: bool) -> None:
    """Print `value` as JSON to stdout where a program asked for it."""
    if wanted:
        print(json.dumps(value, indent=2))


def artifact_of(path: Path | str) -> Path:
    """A run's artifact, or the artifact itself; downloaded where it is `hf://owner/name`."""
    path = _fetched(path)
    return path / "adapter" if (path / "adapter" / "adapter_config.json").is_file() else path


def opened_as(path: Path | str, base: str | None = None) -> str:
    """What to type after a verb to open this run or artifact again, its base included where nothing else names it."""
    from toolkit.packaging import read_manifest

    if base:
        return f"{path} --base {base}"
    if run := next((each for each in (Path(path), Path(path).parent) if (each / "recipe.yaml").is_file()), None):
        return str(run)
    is_local = read_manifest(artifact_of(path))["base"]["revision"] is None
    return f"{path} --base BASE" if is_local else str(path)


def _fetched(path: Path | str) -> Path:
    """A `Path` has lost one slash of `hf://`."""
    name = re.sub(r"^hf:/+", "hf://", str(path))
    if not name.startswith("hf://"):
        return Path(path)
    from toolkit.packaging import fetch_adapter

    return fetch_adapter(name)


def reopen(
    path: Path, overrides: list[str] | None, base: str | None, console: Console, *, as_trained: bool = False
) -> tuple[Plan, Any, Any]:
    """The plan, adapted model and tokenizer of a run folder or artifact."""
    from toolkit import flow
    from toolkit.packaging import reopen_recipe
    from toolkit.plan import make_plan

    path = _fetched(path)
    recipe = reopen_recipe(path, overrides or [], base, note=lambda line: console.print(f"note: {line}"))
    made = make_plan(recipe, for_training=False)
    model, tokenizer = flow.reopen(made, artifact_of(path), as_trained=as_trained)
    return made, model, tokenizer
