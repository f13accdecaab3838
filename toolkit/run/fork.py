"""A new run from the weights of another: what `--fork` does where a recipe has changed too much to go on.

Optimizer, schedule and place in the data belong to the old recipe and stay behind.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from toolkit.durable import staged_folder
from toolkit.errors import RecipeError
from toolkit.recipe import Effect, Recipe, changes, flat
from toolkit.run.folder import read_recipe
from toolkit.run_folder import RunFolder
from toolkit.training.checkpoint import newest_checkpoint

__all__ = ["copy_start", "fork_recipe"]

_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


def fork_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a fork: in a folder beside the run, from its weights. The same recipe gives the same fork again.

    Raises:
        RecipeError: there is no run to fork, or the recipe changes the adapter itself.
    """
    run = RunFolder(Path(recipe.training.output_dir))
    if not run.recipe.is_file():
        raise RecipeError(f"{run.path}: no run to fork; leave --fork away")
    other = [c for c in changes(flat(read_recipe(run.recipe)), flat(recipe)) if c.field.startswith("lora.")]
    if other:
        raise RecipeError(f"{other[0]}: a fork goes on with the run's adapter as it is; undo that, or start anew")
    number = 1
    while True:
        name = f"{run.path.name}-fork" + (f"-{number}" if number > 1 else "")
        fork = _started_from(recipe, run.path.with_name(name))
        folder = RunFolder(Path(fork.training.output_dir))
        if not folder.path.exists() or (folder.recipe.is_file() and _is_same(read_recipe(folder.recipe), fork)):
            return fork
        number += 1


def copy_start(run: RunFolder, source: RunFolder) -> None:
    """Copy the newest weights of `source` to where the fork `run` starts from, unless they are there.

    Raises:
        RecipeError: the source has none.
    """
    if run.start.exists():
        return
    checkpoint = newest_checkpoint(source.checkpoints)
    weights = checkpoint.path if checkpoint else source.adapter
    if not all((weights / name).is_file() for name in _ADAPTER):
        raise RecipeError(f"{source.path}: has no weights to fork; leave --fork away and give another output_dir")
    with staged_folder(run.start) as staging:
        for name in _ADAPTER:
            shutil.copyfile(weights / name, staging / name)


def _started_from(recipe: Recipe, folder: Path) -> Recipe:
    start = str(RunFolder(folder).start.absolute())
    return recipe.model_copy(
        update={
            "lora": recipe.lora.model_copy(update={"adapter_name_or_path": start}),
            "training": recipe.training.model_copy(update={"output_dir": str(folder)}),
        }
    )


def _is_same(one: Recipe, other: Recipe) -> bool:
    return all(change.effect is not Effect.BINDS for change in changes(flat(one), flat(other)))
