"""Rows of a source to valid examples, with everything that was wrong counted or refused.

This is where a file's shape is decided, from its first rows, and every row is then held to it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from toolkit.data.extra_columns import LEFT_OUT, ExtraColumns
from toolkit.data.formats import SHAPES, Example, add_system, choose_shape, rename
from toolkit.data.problems import InvalidRow, Problems, listed
from toolkit.data.rows import Row
from toolkit.data.spool import Spool
from toolkit.errors import DataError, did_you_mean

__all__ = ["Reading", "Split", "counted"]

_PEEK = 100  # rows from which the columns are read: optional ones may be missing in the first
_TRIMMED = "turns after the last answer were left out"
_PADDED = "nulls that Arrow had filled in were taken out of tool calls and schemas"
_ALONE = "rows without a value of data.group_by stand alone"


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
        rows = map(self._without_columns, rows) if self.remove_columns else rows
        peeked = list(itertools.islice(rows, _PEEK))
        examples = Spool[Example](Example.memory) if into is None else into
        split, problems, before = Split(name, where, examples=examples), Problems(), len(examples)
        columns = {str(key) for row in peeked if isinstance(row.values, dict) for key in row.values}
        self.seen |= columns
        shape = self._shape(columns, where) if columns else None
        extra = ExtraColumns(self._read_columns(shape))
        for row in itertools.chain(peeked, rows):
            try:
                if isinstance(row.values, dict) and extra.leaves_out(row.values):
                    split.drops[LEFT_OUT] += 1
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

    def _shape(self, columns: Set[str], where: str) -> str:
        shape = choose_shape(self.format, columns, self.columns, where)
        self.found = self.found or shape
        if self.group_by is not None and self.group_by not in columns:
            near = did_you_mean(self.group_by, sorted(columns)) or f"; it has {listed(sorted(columns))}"
            raise DataError(f"{where}: data.group_by: no column {self.group_by!r}{near}")
        return shape

    def _read_columns(self, shape: str | None) -> Set[str]:
        """The file's columns that something here reads."""
        ours = {*SHAPES[shape].required, *SHAPES[shape].optional} if shape else set()
        theirs = {theirs for our, theirs in self.columns.items() if our in ours}
        return (ours - self.columns.keys()) | theirs | ({self.group_by} if self.group_by else set())

    def _example(self, row: Row, shape: str | None, source: int) -> Example:
        if isinstance(row.values, InvalidRow):
            raise row.values
        if shape is None:
            raise InvalidRow("missing column", "no columns in it or in the first rows; rows need named columns")
        example = SHAPES[shape].parse(rename(row.values, self.columns))
        if self.system_prompt is not None and not example.messages:
            raise DataError(f"{row.place}: plain text has no system turn; remove data.system_prompt or use messages")
        group = _group(row.values.get(self.group_by)) if self.group_by else None
        alone = self.group_by is not None and group is None
        for told, text in ((example.trimmed, _TRIMMED), (row.padded, _PADDED), (alone, _ALONE)):
            if told:
                self.notices[text] += 1
        for note in example.notes:
            self.notices[note] += 1
        return replace(add_system(example, self.system_prompt), place=row.place, group=group, source=source)


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
