"""Rows of one or several data sets to valid examples, with everything that was wrong counted or refused.

This is where a file's shape is decided, from its first rows, and every row is then held to it. Columns that its format
does not read are left aside and counted, or refused where the row would mean another thing: other tools read many of
them, and learning as if they were not there would be another training than the data's author meant.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from toolkit.data.envelopes import unwrapped
from toolkit.data.files import Row
from toolkit.data.formats import SHAPES, Example, Shape, add_system, carries, choose_shape, rename
from toolkit.data.pairs import PAIRS, UNPAIRED
from toolkit.data.problems import InvalidRow, Problems, listed, printable
from toolkit.data.sources import open_source
from toolkit.data.storage import Spool
from toolkit.errors import DataError, did_you_mean

__all__ = [
    "DataSource",
    "Reading",
    "Split",
    "counted",
    "read_sources",
    "require_removed",
    "sources_of",
]

_PEEK = 100  # rows from which the columns are read: optional ones may be missing in the first
_TRIMMED = "turns after the last answer were left out"
_PADDED = "nulls added by Arrow were removed from tool calls and schemas"
_ALONE = "rows without a value of data.group_by stand alone"

_LEFT_OUT = "weight 0 or train: false"

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PAIR = (
    *("chosen", "rejected", "rejected_response", "rejected_messages"),
    *("preferred_output", "non_preferred_output"),
)
_VERDICTS = ("kto_tag", "label")
_FLAGS = ("train", "loss")
_WEIGHTS = ("weight", "sample_weight")
_WORDS: Mapping[str, bool | float] = {"true": True, "false": False}
_MEANT = frozenset((*_MEDIA, *_PAIR, *_VERDICTS, *_FLAGS, *_WEIGHTS))
_MOST_NAMED = 12


@dataclass
class Split:
    """One split as it was read: `rows` read, valid `examples` in the order of the source, `drops` by reason."""

    name: str
    where: str
    rows: int = 0
    examples: Sequence[Example] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    rows_of: Counter[int] = field(default_factory=Counter)
    """Rows read by the number of their data set, where there are several."""


@dataclass
class Reading:
    """How the rows of a data set are read; the arguments are the recipe's.

    `found` is the format of the split read first, `notices` what deserves a look and how many examples it concerns.
    """

    format: str
    columns: Mapping[str, str]
    system_prompt: str | None
    on_invalid: Literal["error", "drop"]
    remove_columns: Sequence[str] = ()
    group_by: str | None = None
    shapes: Mapping[str, Shape] = field(default_factory=lambda: SHAPES)
    """The formats that rows may have, by name."""
    kept: Sequence[str] = ()
    """Further columns that an example keeps, for rewards."""
    found: str = ""
    notices: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    """The columns of the first rows."""
    removed: set[str] = field(default_factory=set)
    """Those of `remove_columns` that some row had."""

    def read(
        self, name: str, where: str, rows: Iterator[Row], source: int = 0, into: Spool[Example] | None = None
    ) -> Split:
        """All valid examples of `rows`, marked as the data set number `source`, after those that are in `into`.

        Raises:
            DataError: the columns fit no format, a row is invalid and invalid rows are not to be dropped, or none
                is valid; there is no column `group_by`.
        """
        rows = map(self._under_our_names, map(self._without_columns, rows) if self.remove_columns else rows)
        peeked = list(itertools.islice(rows, _PEEK))
        examples = Spool[Example](Example.memory) if into is None else into
        split, problems, before = Split(name, where, examples=examples), Problems(), len(examples)
        columns = {str(key) for row in peeked if isinstance(row.values, dict) for key in row.values}
        self.seen |= columns
        shape = self._shape(columns, where) if columns else None
        extra = _ExtraColumns(self._read_columns(shape))
        for row in itertools.chain(peeked, rows):
            try:
                if isinstance(row.values, dict) and extra.leaves_out(row.values):
                    split.drops[_LEFT_OUT] += 1
                else:
                    examples.append(self._example(row, shape, source))
            except InvalidRow as problem:
                problems.add(split.rows, row.place, problem)
            except RecursionError:
                problems.add(split.rows, row.place, InvalidRow("nested too deeply", "nested too deeply to be read"))
            split.rows += 1
        problems.settle(self.on_invalid, split.rows)
        split.drops += problems.reasons
        if len(examples) == before:
            raise DataError(
                f"{where}: no usable example in {split.rows} rows ({counted(split.drops)}){problems.advice}"
            )
        self.notices.update(dict(extra.notices()))
        return split

    def _without_columns(self, row: Row) -> Row:
        if isinstance(row.values, InvalidRow):
            return row
        self.removed |= row.values.keys() & set(self.remove_columns)
        return replace(row, values={k: v for k, v in row.values.items() if k not in self.remove_columns})

    def _under_our_names(self, row: Row) -> Row:
        if isinstance(row.values, InvalidRow):
            return row
        try:
            found = unwrapped(row.values, pairs=PAIRS in self.shapes, judged=UNPAIRED in self.shapes)
        except InvalidRow as problem:
            return replace(row, values=problem)
        # A column that the recipe names is read under that name.
        named = {*self.columns.values(), *self.kept, *([self.group_by] if self.group_by else [])}
        return row if row.values.keys() & named - found.keys() else replace(row, values=dict(found))

    def _shape(self, columns: Set[str], where: str) -> str:
        shape = choose_shape(self.format, columns, self.columns, where, self.shapes)
        self.found = self.found or shape
        if self.group_by is not None and self.group_by not in columns:
            near = did_you_mean(self.group_by, sorted(columns)) or f"; it has {listed(sorted(columns))}"
            raise DataError(f"{where}: data.group_by: no column {self.group_by!r}{near}")
        for column in self.kept:
            if column not in columns:
                near = did_you_mean(column, sorted(columns)) or f"; it has {listed(sorted(columns))}"
                raise DataError(f"{where}: rewards.columns: no column {column!r}{near}")
        return shape

    def _read_columns(self, shape: str | None) -> Set[str]:
        """The file's columns that something here reads."""
        ours = {*self.shapes[shape].required, *self.shapes[shape].optional} if shape else set()
        theirs = {theirs for our, theirs in self.columns.items() if our in ours}
        return (ours - self.columns.keys()) | theirs | ({self.group_by} if self.group_by else set()) | {*self.kept}

    def _example(self, row: Row, shape: str | None, source: int) -> Example:
        if isinstance(row.values, InvalidRow):
            raise row.values
        if shape is None:
            raise InvalidRow("missing column", "no columns in it or in the first rows; rows need named columns")
        example = self.shapes[shape].parse(rename(row.values, self.columns))
        if self.system_prompt is not None and not example.messages:
            raise DataError(f"{row.place}: plain text has no system turn; remove data.system_prompt or use messages")
        group = _group(row.values.get(self.group_by)) if self.group_by else None
        alone = self.group_by is not None and group is None
        for told, text in ((example.trimmed, _TRIMMED), (row.padded, _PADDED), (alone, _ALONE)):
            if told:
                self.notices[text] += 1
        for note in example.notes:
            self.notices[note] += 1
        kept = {name: row.values.get(name) for name in self.kept}
        example = add_system(example, self.system_prompt)
        return replace(example, place=row.place, group=group, source=source, columns=kept)


def _group(value: Any) -> bytes | None:
    """A hash of a group's name; a number and its text are one group, since CSV holds text alone."""
    if value is None or value == "":
        return None
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    name = json.dumps(value, sort_keys=True, default=str) if isinstance(value, (dict, list)) else str(value)
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def counted(reasons: Mapping[str, int]) -> str:
    """`reasons` as "reason: count", most frequent first."""
    return ", ".join(f"{reason}: {n}" for reason, n in sorted(reasons.items(), key=lambda each: (-each[1], each[0])))


class _ExtraColumns:
    """Judges the columns of each row of one split that its format does not read.

    `unused` counts the rows in which a column says something and is left aside.
    """

    def __init__(self, read: Set[str]) -> None:
        self._read = read
        self.unused: Counter[str] = Counter()

    def leaves_out(self, values: Mapping[str, Any]) -> bool:
        """Whether the row's own mark says that it is not trained on.

        Raises:
            InvalidRow: a column changes what the row means, and cannot be followed here.
        """
        out = False
        for name in values.keys() - self._read:
            value = values[name]
            if not carries(value):
                continue
            if name not in _MEANT:
                self.unused[name] += 1
                continue
            mark = _mark(name, value)
            if mark is None:
                _refuse(name, value)
                self.unused[name] += 1
            out |= mark is False
        return out

    def notices(self) -> Iterable[tuple[str, int]]:
        """One line a column, the most frequent first; beyond a dozen, one line for the rest."""
        counts = self.unused.most_common()
        for name, rows in sorted(counts[:_MOST_NAMED]):
            yield f"column {printable(name)!r} is not used", rows
        if rest := counts[_MOST_NAMED:]:
            yield f"{len(rest)} more columns are not used", max(rows for _, rows in rest)


def _mark(name: str, value: Any) -> bool | None:
    """Whether a mark of the whole row says that it is trained; nothing where the column is no mark.

    Raises:
        InvalidRow: a share between, which no example can have here.
    """
    value = _WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
    if name in _FLAGS:
        return value if isinstance(value, bool) else None
    number = _number(value) if name in _WEIGHTS else None
    if number is None:
        return None
    if number not in (0.0, 1.0):
        raise InvalidRow(
            "bad weight",
            f"{name} is {number:g}; a row is trained (1) or left out (0); give sets their weight in data.train, or "
            f"write data.remove_columns: [{name}]",
        )
    return number == 1.0


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _refuse(name: str, value: Any) -> None:
    aside = f"or ignore the column: data.remove_columns: [{name}]"
    if name in _MEDIA:
        raise InvalidRow("more than text", f"{name}: the row has more than text; take text rows, {aside}")
    if name in _PAIR:
        learn = "learn from both with training.method: dpo, keep one answer"
        raise InvalidRow("a preference pair", f"{name}: the row has a better and a worse answer; {learn}, {aside}")
    if value is False and name in _VERDICTS:
        learn = "learn from it with training.method: kto, remove the row"
        raise InvalidRow("an answer marked as bad", f"{name} marks the answer as bad; {learn}, {aside}")


@dataclass(frozen=True)
class DataSource:
    """One of the data sets to train on; what is None is as in the data section."""

    path: str
    weight: float = 1.0
    format: str | None = None
    max_samples: int | None = None
    name: str | None = None
    split: str | None = None
    columns: Mapping[str, str] | None = None


def sources_of(
    train: str | Sequence[Mapping[str, Any]], name: str | None = None, split: str | None = None
) -> list[DataSource]:
    """`data.train` of a recipe as a list; `name` and `split` are those of sets that give none."""
    sources = [DataSource(train)] if isinstance(train, str) else [DataSource(**each) for each in train]
    return [replace(each, name=each.name or name, split=each.split or split) for each in sources]


def read_sources(
    sources: Sequence[DataSource],
    reading: Reading,
    base_folder: Path,
    *,
    name: str = "train",
    split: str | None = None,
) -> Split:
    """All examples of `sources`, one after the other, each marked with the number of its set.

    Args:
        sources: the data sets.
        reading: how rows are read where a set does not say; it collects what was found.
        base_folder: where relative paths start.
        name: of the split that is made of them.
        split: the one that is read of each, instead of its own.

    Raises:
        DataError: one of them cannot be read, or a column to remove is in none.
    """
    examples = Spool[Example](Example.memory)
    whole = Split(name, _where(sources[0].path, split) if len(sources) == 1 else "data.train", examples=examples)
    formats: dict[str, None] = {}
    for number, source in enumerate(sources):
        columns = reading.columns if source.columns is None else source.columns
        own = replace(reading, format=source.format or reading.format, columns=columns, found="")
        asked = split or source.split
        rows = open_source(
            source.path, name=source.name, split=None if asked == "train" else asked, base_folder=base_folder
        )
        part = own.read(name, _where(source.path, split), rows, number, examples)
        formats[own.found] = None
        whole.rows += part.rows
        whole.drops += part.drops
        whole.rows_of[number] += part.rows
    reading.found = reading.found or ", ".join(formats)
    return whole


def require_removed(reading: Reading, where: str) -> None:
    """Refuse a column to remove that no row had: it is misspelt.

    Raises:
        DataError: there is one.
    """
    for column in reading.remove_columns:
        if column not in reading.removed:
            near = did_you_mean(column, sorted(reading.seen)) or f"; it has {', '.join(sorted(reading.seen)[:12])}"
            raise DataError(f"{where}: data.remove_columns: no column {column!r}{near}")


def _where(path: str, split: str | None) -> str:
    return f"{path}[{split}]" if split else path
