"""Opening a run's folder: what it must not hold, what it must have room for, and going on with the run in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from toolkit.durable import write_text
from toolkit.errors import ModelError, OnecardError, RecipeError, ResourceError
from toolkit.recipe import Effect, Recipe, changes, dump, flat, parse
from toolkit.run.lock import LOCK
from toolkit.run.resume import refuse_changes
from toolkit.run_folder import RunFolder
from toolkit.training.checkpoint import every_checkpoint

__all__ = ["check_folder_is_ours", "check_writable", "open_run", "read_recipe", "require_disk", "with_decided"]

_FIRST = {LOCK, ".recipe.yaml.tmp"}
"""What lies in a run folder before its recipe does; a kill may leave it there."""


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
    found = changes(flat(read_recipe(run.recipe)), flat(recipe)) if run.recipe.is_file() else []
    try:
        if _has_started(run):
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


def with_decided(recipe: Recipe) -> Recipe:
    """The recipe with what its run has decided for `auto` when it began: other memory may be free today."""
    run = RunFolder(Path(recipe.training.output_dir))
    if not (run.recipe.is_file() and _has_started(run)):
        return recipe
    before = read_recipe(run.recipe)
    if recipe.lora.r == "auto":
        recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"r": before.lora.r})})
    if recipe.training.max_length == "auto":
        length = {"max_length": before.training.max_length}
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=length)})
    return recipe


def _has_started(run: RunFolder) -> bool:
    return run.adapter.exists() or any(every_checkpoint(run.checkpoints))


def read_recipe(path: Path) -> Recipe:
    """The recipe of a run folder. Raises `ModelError` where it is damaged."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path), note=lambda line: None)
    except (OnecardError, OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: damaged or of another version ({error}); move the run folder away") from None
