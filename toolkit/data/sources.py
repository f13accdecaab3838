"""From what a recipe calls its data (a file, a folder, a Hub name) to rows, each with the place it came from.

The Hub side is `datasets.load_dataset`. Files are opened by us: `datasets` hides which file and line a row came from,
and ends with a bare StopIteration on an empty file. JSONL, JSON and CSV are read line by line, and a row that cannot be
read is yielded as a problem, so that all of them can be counted. A mistyped path is told from a Hub name here, too.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.data.arrow import ArrowValues, find_padding
from toolkit.data.problems import JSON, KEY_TWICE, InvalidRow, listed
from toolkit.data.saved import arrow_rows, describes_data, is_saved, lists_saved, saved_around, saved_rows
from toolkit.errors import DataError, did_you_mean

__all__ = ["Row", "open_source", "read_chat_template", "read_rows"]

# A whole document may stand in one CSV field; the csv module's own limit is 128 KiB, for the whole process.
_LONGEST_FIELD = 2**31 - 1
_CONTAINERS = ("data", "rows", "examples", "train")

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
_FOREIGN = (".bz2", ".gz", ".md", ".pkl", ".tsv", ".txt", ".xls", ".xlsx", ".xz", ".zip", ".zst")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its place (`file:line` or `file:row N`), and its columns or what is wrong with it."""

    place: str
    values: dict[str, Any] | InvalidRow
    padded: bool = False
    """Nulls that Arrow had filled in were taken out of it."""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, or of a folder that `save_to_disk` wrote, read as they are asked for.

    Raises:
        DataError: the file cannot be opened, is not in the format of its suffix, or is empty.
    """
    empty = True
    try:
        for row in _read_saved(path) if path.is_dir() else _READERS[path.suffix.lower()](path):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if empty:
        raise DataError(f"{path}: empty; a data file holds at least one row")


def _parse_json(raw: bytes | str) -> dict[str, Any] | InvalidRow:
    """One JSON object, or the problem that it is not one."""
    try:
        value = JSON.decode(raw if isinstance(raw, str) else raw.decode("utf-8"))
    except InvalidRow as problem:
        return problem
    except UnicodeDecodeError as error:
        return InvalidRow("not UTF-8", f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return InvalidRow("not JSON", f"not JSON: {error.msg} at column {error.colno}; one object a line is expected")
    except RecursionError:
        return InvalidRow("not JSON", "not usable JSON: nested too deeply")
    except ValueError:  # Python refuses whole numbers of more than 4300 digits
        return InvalidRow("not JSON", "not usable JSON: a number with thousands of digits")
    return _object(value)


def _arrow_row(place: str, values: Mapping[str, Any], read: ArrowValues) -> Row:
    """The row of an Arrow table, or what is wrong with it."""
    try:
        return Row(place, *read.read(values))
    except InvalidRow as problem:
        return Row(place, problem)


def _unpadded(read: Callable[[Path], Iterator[Row]]) -> Callable[[Path], Iterator[Row]]:
    """`read` without the nulls that Arrow filled in; a file in which the word null stands is read twice."""

    def rows(path: Path) -> Iterator[Row]:
        padding = None
        if _holds_null(path):
            padding = find_padding(row.values for row in read(path) if isinstance(row.values, dict))
        for row in read(path):
            if padding is None or isinstance(row.values, InvalidRow):
                yield row
            else:
                yield Row(row.place, *padding.clean(row.values))

    return rows


def _holds_null(path: Path) -> bool:
    if not path.stat().st_size:
        return False
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"null") >= 0


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if line.strip():
                yield Row(f"{path}:{number}", _parse_json(line.strip()))


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, an object that holds one under `data`, `rows`, …, or JSONL with the wrong suffix."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    if text.lstrip().startswith("["):
        yield from _read_list(path, text, text.index("[") + 1)
        return
    whole = _parse_json(text) if text.strip() else None
    if not isinstance(whole, dict):
        if whole is not None and whole.reason == KEY_TWICE and "\n{" not in text.rstrip():  # no object a line
            yield Row(f"{path}:1", whole)
        else:
            yield from _read_jsonl(path)
    elif key := next((name for name in _CONTAINERS if isinstance(whole.get(name), list)), None):
        yield from (Row(f"{path}:{key}[{index}]", _object(item)) for index, item in enumerate(whole[key]))
    else:
        yield Row(f"{path}:1", whole)


def _read_list(path: Path, text: str, position: int) -> Iterator[Row]:
    line, counted = 1, 0
    for number in itertools.count(1):
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            value, position = JSON.raw_decode(text, position)
        except InvalidRow as problem:
            yield Row(f"{path}:{line} (item {number})", problem)
            position = json.JSONDecoder().raw_decode(text, position)[1]
            continue
        except (ValueError, RecursionError) as error:
            message = error.msg if isinstance(error, json.JSONDecodeError) else "a value out of bounds"
            at = line + text.count("\n", counted, error.pos) if isinstance(error, json.JSONDecodeError) else line
            raise DataError(f"{path}:{at}: not JSON: {message}; fix it, or write one object a line as .jsonl") from None
        yield Row(f"{path}:{line} (item {number})", _object(value))


def _object(value: Any) -> dict[str, Any] | InvalidRow:
    if isinstance(value, dict):
        return value
    return InvalidRow("not an object", f"a row is a JSON object {{…}}, not a {type(value).__name__}")


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise DataError(f"{path}:1: a column name stands twice in the header; names must differ")
            yield from _csv_rows(path, reader, header)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}; quote fields as in RFC 4180") from None
        except UnicodeDecodeError:
            raise DataError(f"{path}:{reader.line_num + 1}: not UTF-8 here or soon after; save it as UTF-8") from None


def _csv_rows(path: Path, reader: Any, header: list[str]) -> Iterator[Row]:
    while True:
        line = reader.line_num + 1
        fields = next(reader, None)
        if fields is None:
            return
        if len(fields) == len(header):
            yield Row(f"{path}:{line}", dict(zip(header, fields, strict=True)))
        elif fields:
            detail = f"{len(fields)} fields where the header has {len(header)}; quote fields that hold commas"
            yield Row(f"{path}:{line}", InvalidRow("wrong number of fields", detail))


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            read = ArrowValues(file.schema_arrow, decoded=False)
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield _arrow_row(f"{path}:row {number}", values, read)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        detail = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path}: not readable as Parquet after row {number} ({detail}); write it again") from None


def _read_saved(folder: Path) -> Iterator[Row]:
    schema, rows = saved_rows(folder)
    read = ArrowValues(schema, decoded=True)
    for index, values in enumerate(rows):
        yield _arrow_row(f"{folder}:row {index + 1}", values, read)


def _read_arrow(path: Path) -> Iterator[Row]:
    schema, rows = arrow_rows(path)
    read = ArrowValues(schema, decoded=False)
    for number, values in enumerate(rows, start=1):
        yield _arrow_row(f"{path}:row {number}", values, read)


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".json": _unpadded(_read_json),
    ".jsonl": _unpadded(_read_jsonl),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
"""Suffix to reader."""


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
    if _looks_local(source):
        raise DataError(f"{path}: no such file or folder{_neighbours(path)}")
    return _read_hub(source, split or default, name, path)


def require_source(source: str) -> None:
    """Raise `DataError` where examples should be on this machine and are not; a name on the Hub is believed."""
    path = Path(source).expanduser()
    if not path.exists() and _looks_local(source):
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
    if path.suffix.lower() not in _READERS:
        raise DataError(f"{path}: {path.suffix or 'no suffix'}: not a format read here; use {', '.join(_READERS)}")
    return path


def _files_of(folder: Path, split: str, *, asked: bool) -> list[Path]:
    try:
        names = (p for p in folder.rglob("*") if p.suffix.lower() in _READERS and p.is_file())
        found = sorted({saved_around(p) or p for p in names})
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror or error})") from None
    files = [p for p in found if not _is_aside(p.relative_to(folder))]
    if not files:
        raise DataError(f"{folder}: no data file in it; use {', '.join(_READERS)}")
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


def _is_aside(path: Path) -> bool:
    """Hidden, or one of the files that say what lies beside them."""
    return describes_data(path) or any(part.startswith(".") for part in path.parts)


def _tokens(path: Path) -> list[str]:
    parts = [*path.parent.parts, path.stem]
    return [token for part in parts for token in re.findall(r"[a-z]+", part.lower())]


def _split_of(path: Path) -> str | None:
    return next((_SPLITS[token] for token in _tokens(path) if token in _SPLITS), None)


def _is_of(path: Path, split: str) -> bool:
    # One file belongs to one split: otherwise `train-test.jsonl` would be trained on and held out.
    carried = _split_of(path)
    return carried == split if carried else split in _tokens(path)


def _looks_local(source: str) -> bool:
    suffix = Path(source).suffix.lower()
    return (
        suffix in _READERS
        or suffix in _FOREIGN
        or source.startswith((".", "/", "~"))
        or source.endswith("/")
        or _HUB_NAME.fullmatch(source) is None
    )


def _neighbours(path: Path) -> str:
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
        yield _arrow_row(f"{where}:row {index + 1}", values, read)
