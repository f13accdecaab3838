"""The run folder: recipe, plan, metrics, checkpoints and artifact of one training run.

recipe.yaml  plan.json  metrics.jsonl  checkpoints/  adapter/  experts.json  summary.json  report.html
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.durable import write_text
from toolkit.errors import RecipeError, ResourceError

__all__ = ["RunFolder", "check_writable", "open_run"]


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


def open_run(path: Path, recipe_yaml: str) -> RunFolder:
    """Create the run folder, or go on with the run of this very recipe.

    Raises:
        RecipeError: the folder holds something that is not a run, or the run of another recipe.
        ResourceError: it cannot be written.
    """
    run = RunFolder(path)
    started = run.adapter.exists() or (run.checkpoints.is_dir() and any(run.checkpoints.iterdir()))
    if run.recipe.is_file() and started:
        _refuse_other_recipe(run, recipe_yaml)
        return run
    if not run.recipe.is_file() and path.is_dir() and any(path.iterdir()):
        raise RecipeError(f"training.output_dir: {path} is not empty and not a run; give another folder")
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text(run.recipe, recipe_yaml)
    except OSError as error:
        raise ResourceError(f"training.output_dir: {path} cannot be written ({error.strerror})") from None
    return run


def _refuse_other_recipe(run: RunFolder, recipe_yaml: str) -> None:
    from ruamel.yaml import YAML

    before, now = (_flat(YAML(typ="safe").load(text)) for text in (run.recipe.read_text(encoding="utf-8"), recipe_yaml))
    changed = sorted(key for key in before | now if before.get(key) != now.get(key))
    if changed:
        shown = ", ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed[:3])
        raise RecipeError(
            f"{run.path}: holds the run of another recipe ({shown}{', …' if len(changed) > 3 else ''}); "
            "set training.output_dir to a new folder"
        )


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, fields in recipe.items() for key, value in fields.items()}
