"""The run folder: recipe, plan, metrics, checkpoints and artifact of one training run.

recipe.yaml  plan.json  chat.json  metrics.jsonl  checkpoints/  adapter/  experts.json  summary.json  report.html
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.durable import write_text
from toolkit.errors import ModelError, OnecardError, RecipeError, ResourceError
from toolkit.recipe import Effect, Recipe, changes, dump, flat, parse
from toolkit.run.lock import LOCK
from toolkit.run.resume import refuse_changes
from toolkit.training.checkpoint import every_checkpoint

__all__ = ["RunFolder", "check_folder_is_ours", "check_writable", "open_run", "read_recipe", "require_disk"]

_FIRST = {LOCK, ".recipe.yaml.tmp"}
"""What lies in a run folder before its recipe does; a kill may leave it there."""


@dataclass(frozen=True)
class RunFolder:
    """Where each part of a run lies."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """The plan, JSON."""
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The artifact."""
        return self.path / "adapter"

    @property
    def chat(self) -> Path:
        """How the trained model is asked, and what ends its answers."""
        return self.path / "chat.json"

    @property
    def start(self) -> Path:
        """The adapter that a fork starts from."""
        return self.path / "start"

    @property
    def compensated(self) -> Path:
        """The base's integers after error compensation, where the recipe asks for it."""
        return self.path / "compensated.safetensors"

    @property
    def experts(self) -> Path:
        """What happened to the experts: load, router entropy, adapter size, by layer."""
        return self.path / "experts.json"

    @property
    def report(self) -> Path:
        """The run's page."""
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        """Coverage and results; its presence says that the run is finished."""
        return self.path / "summary.json"

    def read_summary(self) -> dict[str, Any] | None:
        """The finished run's summary, or None while it is not finished."""
        if not self.summary.is_file():
            return None
        summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        return summary


def check_writable(path: Path) -> None:
    """Raise `ResourceError` unless a run folder can be made or written at `path`. Leaves nothing behind."""
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ResourceError(f"training.output_dir: {parent} is a file; give a folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ResourceError(
            f"training.output_dir: {parent} cannot be written ({error.strerror}); give another"
        ) from None


def require_disk(path: Path, needed: int) -> None:
    """Raise `ResourceError` unless `needed` bytes more than what the run holds already fit on its disk."""
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    parent = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed - there > free:
        raise ResourceError(
            f"training.output_dir: {parent} has {free / 1e9:.2f} GB free, the run writes {(needed - there) / 1e9:.2f} "
            "GB; free space, lower training.save_total_limit or lora.r, or give a folder on another disk"
        )


def check_folder_is_ours(path: Path) -> None:
    """Raise `RecipeError` where the folder holds something that is no run."""
    run = RunFolder(path)
    if not run.recipe.is_file() and path.is_dir() and any(each.name not in _FIRST for each in path.iterdir()):
        raise RecipeError(f"training.output_dir: {path} is not empty and not a run; give another folder")


def open_run(path: Path, recipe: Recipe, note: Callable[[str], None] = lambda line: None) -> RunFolder:
    """Create the run folder, or go on with the run in it; what changed and is allowed is noted.

    A finished run whose end is moved is no longer finished.

    Raises:
        RecipeError: the folder holds something that is not a run.
        ModelError: it holds the run of a recipe that differs in something that matters.
        ResourceError: it cannot be written.
    """
    run = RunFolder(path)
    check_folder_is_ours(path)
    started = run.adapter.exists() or any(every_checkpoint(run.checkpoints))
    found = changes(flat(read_recipe(run.recipe)), flat(recipe)) if run.recipe.is_file() else []
    try:
        if started:
            refuse_changes(path, found, note)
            if any(change.effect is Effect.LENGTH for change in found):
                run.summary.unlink(missing_ok=True)
        elif found:  # integers compensated on another recipe's examples
            run.compensated.unlink(missing_ok=True)
        path.mkdir(parents=True, exist_ok=True)
        write_text(run.recipe, dump(recipe))
        run.checkpoints.mkdir(exist_ok=True)
    except OSError as error:
        raise ResourceError(f"training.output_dir: {path} cannot be written ({error.strerror})") from None
    return run


def read_recipe(path: Path) -> Recipe:
    """The recipe of a run folder. Raises `ModelError` where it is damaged."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path), note=lambda line: None)
    except (OnecardError, OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: damaged or of another version ({error}); move the run folder away") from None
