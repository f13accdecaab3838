"""Data files to rows, each with the place it came from: JSONL, JSON, CSV and Parquet.

`datasets` names no line for a broken JSON row and ends with a bare StopIteration on an empty file, so text formats are
read here line by line; a row that cannot be read is yielded as a problem, so that all of them can be counted.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.data.arrow import ArrowValues
from toolkit.data.padding import find_padding
from toolkit.data.problems import InvalidRow
from toolkit.errors import DataError

__all__ = ["READERS", "Row", "arrow_row", "parse_json", "read_rows"]

# A whole document may stand in one CSV field; the csv module's own limit is 128 KiB, for the whole process.
_LONGEST_FIELD = 2**31 - 1
_CONTAINERS = ("data", "rows", "examples", "train")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its place (`file:line` or `file:row N`), and its columns or what is wrong with it."""

    place: str
    values: dict[str, Any] | InvalidRow
    padded: bool = False
    """Nulls that Arrow had filled in were taken out of it."""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, read as they are asked for.

    Raises:
        DataError: the file cannot be opened, is not in the format of its suffix, or is empty.
    """
    empty = True
    try:
        for row in READERS[path.suffix.lower()](path):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if empty:
        raise DataError(f"{path}: empty; a data file holds at least one row")


def parse_json(raw: bytes | str) -> dict[str, Any] | InvalidRow:
    """One JSON object, or the problem that it is not one."""
    try:
        value = json.loads(raw if isinstance(raw, str) else raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return InvalidRow("not UTF-8", f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return InvalidRow("not JSON", f"not JSON: {error.msg} at column {error.colno}; one object a line is expected")
    except RecursionError:
        return InvalidRow("not JSON", "not usable JSON: nested too deeply")
    except ValueError:  # Python refuses whole numbers of more than 4300 digits
        return InvalidRow("not JSON", "not usable JSON: a number with thousands of digits")
    if isinstance(value, dict):
        return value
    return InvalidRow("not an object", f"a row is a JSON object {{…}}, not a {type(value).__name__}")


def arrow_row(place: str, values: Mapping[str, Any], read: ArrowValues) -> Row:
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
                yield Row(f"{path}:{number}", parse_json(line.strip()))


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, an object that holds one under `data`, `rows`, …, or JSONL with the wrong suffix."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    if text.lstrip().startswith("["):
        yield from _read_list(path, text, text.index("[") + 1)
        return
    whole = parse_json(text) if text.strip() else None
    if not isinstance(whole, dict):
        yield from _read_jsonl(path)
        return
    key = next((name for name in _CONTAINERS if isinstance(whole.get(name), list)), None)
    if key is None:
        yield Row(f"{path}:1", whole)
        return
    for index, item in enumerate(whole[key]):
        yield Row(f"{path}:{key}[{index}]", _object(item))


def _read_list(path: Path, text: str, position: int) -> Iterator[Row]:
    decoder, line, counted = json.JSONDecoder(), 1, 0
    for number in itertools.count(1):
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
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
                    yield arrow_row(f"{path}:row {number}", values, read)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        detail = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path}: not readable as Parquet after row {number} ({detail}); write it again") from None


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".json": _unpadded(_read_json),
    ".jsonl": _unpadded(_read_jsonl),
    ".parquet": _read_parquet,
}
"""Suffix to reader."""
