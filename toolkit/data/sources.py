"""From what a recipe calls its data (a file, a folder, a Hub name) to rows, each with the place it came from.

The Hub side is `datasets.load_dataset`, files are read by `files`. A mistyped path is told from a Hub name here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from toolkit.data.arrow import ArrowValues
from toolkit.data.files import COMPRESSED, READABLE, Row, arrow_row, bare_name, is_readable, kind_of, read_rows
from toolkit.data.problems import listed
from toolkit.data.saved import describes_data, is_saved, lists_saved, saved_around
from toolkit.errors import DataError, did_you_mean

__all__ = ["looks_local", "open_source", "read_chat_template"]

_SPLITS: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}
_LARGEST_TEMPLATE = 1 << 20
_FOREIGN = (*COMPRESSED, ".md", ".pkl", ".txt", ".xls", ".xlsx", ".xz", ".zip")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_source(
    source: str, *, split: str | None = None, default: str = "train", name: str | None = None, base_folder: Path
) -> Iterator[Row]:
    """The rows of one split of `source`.

    Args:
        source: a file, a folder of files or of `save_to_disk`, or a Hub dataset `owner/name`.
        split: the split to read. A single file has none, and refuses one that is asked for.
        default: the split when none is asked for: of a Hub dataset, and of a folder whose file names carry splits.
        name: configuration of a Hub dataset.
        base_folder: relative paths start here.

    Raises:
        DataError: nothing is there, it has no such split, or it cannot be read.
    """
    path = base_folder / Path(source).expanduser()
    is_one = path.is_file() or is_saved(path)
    if is_one and split is not None and split != default:
        kind = "file" if path.is_file() else "saved data set"
        raise DataError(f"{path}: one {kind} has no split {split!r}; give data.validation or data.validation_size")
    if is_one:
        return _chain([_known(path)])
    if path.is_dir():
        return _chain(_files_of(path, split or default, asked=split is not None))
    if looks_local(source):
        raise DataError(f"{path}: no such file or folder{_neighbours(path)}")
    return _read_hub(source, split or default, name, path)


def require_source(source: str) -> None:
    """Raise `DataError` where examples should be on this machine and are not; a name on the Hub is believed."""
    path = Path(source).expanduser()
    if not path.exists() and looks_local(source):
        raise DataError(f"{path}: no such file or folder{_neighbours(path)}")


def read_chat_template(path: Path) -> str:
    """The text of a Jinja file.

    Raises:
        DataError: it is missing, empty, too large for a template, or not UTF-8.
    """
    try:
        if path.stat().st_size > _LARGEST_TEMPLATE:
            raise DataError(f"{path}: larger than 1 MiB; this is not a chat template")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such chat template{_neighbours(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a chat template ({error}); give a UTF-8 Jinja file") from None
    if not text.strip():
        raise DataError(f"{path}: empty; a chat template is a Jinja file")
    return text


def _chain(files: list[Path]) -> Iterator[Row]:
    for file in files:
        yield from read_rows(file)


def _known(path: Path) -> Path:
    if is_saved(path):
        return path
    if whole := path.parent if lists_saved(path) else saved_around(path):
        raise DataError(f"{path}: a part of a data set that save_to_disk wrote; give its folder, {whole}")
    if not is_readable(path):
        raise DataError(f"{path}: {kind_of(path) or 'no suffix'}: not a format read here; use {READABLE}")
    return path


def _files_of(folder: Path, split: str, *, asked: bool) -> list[Path]:
    try:
        names = [p for p in folder.rglob("*") if _holds_rows(p) and p.is_file()]
        found = sorted({saved_around(p) or p for p in names})
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror or error})") from None
    files = [_known(p) for p in found if not _is_aside(p.relative_to(folder))]
    if twice := next((p for p in files if p.suffix.lower() in COMPRESSED and p.with_suffix("") in files), None):
        raise DataError(f"{twice}: the same file lies beside it unpacked, and would be read twice; move one away")
    if not files:
        raise DataError(f"{folder}: no data file in it; use {READABLE}")
    wanted = _SPLITS.get(split.lower(), split.lower())
    chosen = [p for p in files if _is_of(p.relative_to(folder), wanted)]
    carried = sorted({s for p in files if (s := _split_of(p.relative_to(folder)))})
    if chosen or carried or (asked and wanted not in _SPLITS.values()):
        if not chosen:
            has = f"its file names carry {listed(carried)}" if carried else "its file names carry no split names"
            raise DataError(f"{folder}: no file of the split {split!r}; {has}{did_you_mean(split, carried)}")
        return chosen
    if wanted != "train" and asked:
        raise DataError(f"{folder}: no file of the split {split!r}; its file names carry no split names")
    return files


def _holds_rows(path: Path) -> bool:
    """Whether a file holds rows by its name, be it in a form that is not read: `.jsonl.xz`."""
    return is_readable(path) or (path.suffix.lower() in _FOREIGN and is_readable(Path(path.stem)))


def _is_aside(path: Path) -> bool:
    """Hidden, or one of the files that say what lies beside them."""
    return describes_data(path) or any(part.startswith(".") for part in path.parts)


def _tokens(path: Path) -> list[str]:
    parts = [*path.parent.parts, bare_name(path)]
    return [token for part in parts for token in re.findall(r"[a-z]+", part.lower())]


def _split_of(path: Path) -> str | None:
    return next((_SPLITS[token] for token in _tokens(path) if token in _SPLITS), None)


def _is_of(path: Path, split: str) -> bool:
    # One file belongs to one split: otherwise `train-test.jsonl` would be trained on and held out.
    carried = _split_of(path)
    return carried == split if carried else split in _tokens(path)


def looks_local(source: str) -> bool:
    """Whether a name can only be one of a file or folder, not of a data set on the Hub."""
    path = Path(source)
    return (
        is_readable(path)
        or path.suffix.lower() in _FOREIGN
        or source.startswith((".", "/", "~"))
        or source.endswith("/")
        or _HUB_NAME.fullmatch(source) is None
    )


def _neighbours(path: Path) -> str:
    if set("*?") & set(path.name):
        return f"; patterns are not read: give the folder {path.parent}, or list its files in data.train"
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder != path.parent:
        return f"; the folder {path.parent} does not exist either"
    try:
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return ""
    return did_you_mean(path.name, names) or f"; {folder} has {listed(names) or 'nothing in it'}"


def _read_hub(source: str, split: str, name: str | None, path: Path) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    where = f"{source}[{split}]"
    try:
        rows = load_dataset(source, name, split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError, KeyError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: no such file ({path}), and the Hub gave no such dataset: {detail}") from None
    if not len(rows):
        raise DataError(f"{where}: empty; a data set holds at least one row")
    read = ArrowValues(rows.features.arrow_schema, decoded=True)
    for index, values in enumerate(rows):
        yield arrow_row(f"{where}:row {index + 1}", values, read)
