"""Files to rows, each with the place it came from; JSON, CSV and TSV may be compressed.

`datasets` hides which file and line a row came from, and ends with a bare StopIteration on an empty file. JSONL and CSV
are read line by line, and a row that cannot be read is yielded as a problem, so that all of them can be counted.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from toolkit.data.arrow import ArrowValues, find_padding
from toolkit.data.problems import JSON, KEY_TWICE, InvalidRow
from toolkit.data.saved import arrow_rows, saved_rows
from toolkit.errors import DataError, first_line

__all__ = ["COMPRESSED", "READABLE", "Row", "arrow_row", "bare_name", "is_readable", "kind_of", "read_rows"]

# A whole document may stand in one CSV field; the csv module's own limit is 128 KiB, for the whole process.
_LONGEST_FIELD = 2**31 - 1
_CONTAINERS = ("data", "rows", "examples", "train")
_BLOCK = 1 << 20


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
        for row in _read_saved(path) if path.is_dir() else _READERS[kind_of(path)](path):
            empty = False
            yield row
    except OSError as error:
        is_damaged = error.errno is None and path.suffix.lower() in COMPRESSED
        advice = "; it is damaged or cut off: compress it again" if is_damaged else ""
        raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)}){advice}") from None
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
    before = b""
    with _opened(path) as stream:
        while block := stream.read(_BLOCK):
            if b"null" in before + block:
                return True
            before = block[-3:]
    return False


def _opened(path: Path) -> IO[bytes]:
    """The bytes of a text file, unpacked as they are read.

    Raises:
        DataError: it is compressed, and its name does not say so.
    """
    if compression := COMPRESSED.get(path.suffix.lower()):
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression=compression), _BLOCK)
    stream = path.open("rb")
    begins = stream.peek(4)
    if end := next((end for magic, end in _MAGIC.items() if begins.startswith(magic)), None):
        stream.close()
        raise DataError(f"{path}: compressed, and its name does not say so; rename it to {path.name}{end}")
    return stream


def _read_jsonl(path: Path) -> Iterator[Row]:
    with _opened(path) as stream:
        for number, raw in enumerate(stream, start=1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if line.strip():
                yield Row(f"{path}:{number}", _parse_json(line.strip()))


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, an object that holds one under `data`, `rows`, …, or JSONL with the wrong suffix."""
    try:
        with _opened(path) as stream:
            text = stream.read().decode("utf-8-sig")
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


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    with io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True, delimiter=delimiter)
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
            detail = f"{len(fields)} fields where the header has {len(header)}; quote fields that hold what parts them"
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


def _read_saved(folder: Path) -> Iterator[Row]:
    schema, rows = saved_rows(folder)
    read = ArrowValues(schema, decoded=True)
    for index, values in enumerate(rows):
        yield arrow_row(f"{folder}:row {index + 1}", values, read)


def _read_arrow(path: Path) -> Iterator[Row]:
    schema, rows = arrow_rows(path)
    read = ArrowValues(schema, decoded=False)
    for number, values in enumerate(rows, start=1):
        yield arrow_row(f"{path}:row {number}", values, read)


COMPRESSED: Mapping[str, str] = {".bz2": "bz2", ".gz": "gzip", ".zst": "zstd"}
"""Suffix of a compressed text file, and Arrow's name for what it is compressed with."""
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
"""How such files begin, and no text in UTF-8."""

_TEXTS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".json": _unpadded(_read_json),
    ".jsonl": _unpadded(_read_jsonl),
    ".ndjson": _unpadded(_read_jsonl),
    ".tsv": partial(_read_csv, delimiter="\t"),
}
_TABLES: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
_READERS = {**_TEXTS, **_TABLES, **{kind + end: _TEXTS[kind] for kind in _TEXTS for end in COMPRESSED}}

READABLE = f"{', '.join((*_TEXTS, *_TABLES))}; text also as {', '.join(COMPRESSED)}"
"""The suffixes that are read, for people."""


def kind_of(path: Path) -> str:
    """What a file is by its name, such as `.jsonl` and `.csv.gz`; what stands before a compression counts."""
    inner = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else ""
    return (inner + path.suffix).lower()


def is_readable(path: Path) -> bool:
    """Whether a file is of a kind that is read here, by its name."""
    return kind_of(path) in _READERS


def bare_name(path: Path) -> str:
    """A file's name without its kind."""
    return path.name[: len(path.name) - len(kind_of(path))]
