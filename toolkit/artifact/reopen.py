"""The recipe behind a finished run or a bare artifact, so that evaluation and chat need no other file."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from ruamel.yaml import YAML

from toolkit.artifact.manifest import TEMPLATE, read_manifest
from toolkit.checkpoint.files import gguf_at
from toolkit.checkpoint.identity import cached_snapshot
from toolkit.errors import ModelError
from toolkit.recipe import Recipe, load, parse

__all__ = ["base_folder", "reopen_recipe", "runs_near"]


def reopen_recipe(
    path: Path, overrides: Sequence[str] = (), base: str | None = None, note: Callable[[str], None] = print
) -> Recipe:
    """The recipe of a run folder, or of an artifact's manifest.

    A chat template or a tokenizer that it names is the artifact's own: the path was one of the machine that trained,
    and what lies there may have changed since.

    Args:
        overrides: `section.key=value`, as for a recipe file.
        base: the base checkpoint to use; a local base is not named in an artifact.

    Raises:
        ModelError: `path` is neither, or its base is a local folder that is not given.
    """
    given = [*overrides, *([f"model.model_name_or_path={base}"] if base else [])]
    if (path / "recipe.yaml").is_file():
        return _with_own_files(load(path / "recipe.yaml", given, note), path / "adapter", given)
    if not (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{path}: neither a run folder nor an adapter; give the folder that `onecard train` named{runs_near(path)}"
        )
    manifest = read_manifest(path)
    if base is None and manifest["base"]["revision"] is None:
        raise ModelError(
            f"{path}: its base {manifest['base']['name']} is a local checkpoint; give it with --base FOLDER"
        )
    stream = io.StringIO()
    YAML().dump(manifest["recipe"], stream)
    return _with_own_files(parse(stream.getvalue(), str(path / "manifest.json"), given, note), path, given)


def _with_own_files(recipe: Recipe, artifact: Path, overrides: Sequence[str]) -> Recipe:
    own = (
        ("data", "chat_template_path", "data.chat_template", artifact / TEMPLATE, TEMPLATE),
        ("model", "tokenizer_name_or_path", "model.tokenizer_name_or_path", artifact, "tokenizer.json"),
    )
    for section, field, key, place, file in own:
        before = getattr(recipe, section)
        is_given = any(each.startswith(key) for each in overrides)
        if getattr(before, field) and (artifact / file).is_file() and not is_given:
            recipe = recipe.model_copy(update={section: before.model_copy(update={field: str(place.absolute())})})
    return recipe


def runs_near(path: Path) -> str:
    """In words, up to three runs in this folder, or in the one above where it is not there."""
    folder = path if path.is_dir() else path.parent
    found = sorted(each.parent for each in folder.glob("*/recipe.yaml")) if folder.is_dir() else []
    return f"; found: {', '.join(map(str, found[:3]))}{', …' if len(found) > 3 else ''}" if found else ""


def base_folder(path: Path, base: str | None = None) -> Path:
    """The original checkpoint behind a run or artifact, a folder or a GGUF file: given, the recipe's, or in the cache.

    Raises:
        ModelError: it is not on this machine.
    """
    recipe = reopen_recipe(path, (), base, note=lambda line: None)
    folder = Path(recipe.model.model_name_or_path)
    return folder if gguf_at(folder) or folder.is_dir() else cached_snapshot(str(folder), recipe.model.revision)
