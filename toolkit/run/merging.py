"""What a merge needs of a finished run beside its adapter: the original of its base, and texts to measure on."""

from __future__ import annotations

from pathlib import Path

from toolkit.artifact import reopen_recipe
from toolkit.checkpoint.remote import fetch
from toolkit.errors import DataError, ModelError
from toolkit.recipe import Recipe
from toolkit.run.data import texts_to_compare

__all__ = ["merge_base_of", "texts_for", "texts_if_any"]


def merge_base_of(path: Path, base: str | None, given: str | None = None) -> Path | None:
    """The folder of the 16-bit original of a run's base, downloaded where it is a Hub name; None where none is named.

    Args:
        path: a run or an artifact. base: given in place of the recipe's, which leaves `model.merge_base` aside too.
        given: in place of `model.merge_base`.

    Raises:
        ModelError: neither a folder nor a Hub name. HubError: the Hub does not give it.
    """
    named = given or (None if base else _recipe(path, base).model.merge_base)
    if named is None:
        return None
    try:
        return fetch(named)
    except ModelError as error:
        where = "--merge-base" if given else "model.merge_base"
        raise ModelError(f"{where}: {error}; give the original with --merge-base FOLDER") from None


def texts_for(
    path: Path, artifact: Path, base: str | None = None, data: Path | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and labels of a run's held-out examples, or of rows in `data`, read as the recipe reads its training
    rows.

    Raises:
        DataError: the recipe holds nothing out, its rows are not here, or `data` cannot be used.
    """
    if data is None:
        try:
            return texts_to_compare(_recipe(path, base), artifact)
        except DataError as error:
            raise DataError(
                f"{path}: what is left of the adapter is measured on held-out rows, and {error}; give rows with "
                "--data FILE"
            ) from None
    unset = [f"data.{name}=null" for name in ("validation", "validation_size", "validation_split", "name")]
    instead = [f"data.train={data}", "data.train_split=train", *unset]
    return texts_to_compare(_recipe(path, base, instead), artifact, held_out=False)


def texts_if_any(
    path: Path, artifact: Path, base: str | None = None, *, wanted: bool = True
) -> tuple[list[list[int]], list[list[int]]]:
    """As `texts_for` of a run's held-out examples, and nothing where it has none, they are not here, or not wanted."""
    try:
        return texts_for(path, artifact, base) if wanted else ([], [])
    except DataError:
        return [], []


def _recipe(path: Path, base: str | None, overrides: list[str] | None = None) -> Recipe:
    return reopen_recipe(path, overrides or (), base, note=lambda line: None)
