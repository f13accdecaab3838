"""Rows of a source to valid examples, with everything that was wrong counted or refused.

This is where a file's shape is decided, from its first rows, and every row is then held to it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Literal

from toolkit.data.formats import SHAPES, Example, add_system, choose_shape, rename
from toolkit.data.problems import InvalidRow, Problems
from toolkit.data.rows import Row
from toolkit.errors import DataError

__all__ = ["Reading", "Split", "counted"]

_PEEK = 100  # rows from which the columns are read: optional ones may be missing in the first
_TRIMMED = "turns after the last answer were left out"


@dataclass
class Split:
    """One split as it was read: `rows` read, valid `examples` in the order of the source, `drops` by reason."""

    name: str
    where: str
    rows: int = 0
    examples: list[Example] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)


@dataclass
class Reading:
    """How the rows of a data set are read; the arguments are the recipe's.

    `found` is the format of the split read first, `notices` what deserves a look and how many examples it concerns.
    """

    format: str
    columns: Mapping[str, str]
    system_prompt: str | None
    on_invalid: Literal["error", "drop"]
    found: str = ""
    notices: Counter[str] = field(default_factory=Counter)

    def read(self, name: str, where: str, rows: Iterator[Row]) -> Split:
        """All valid examples of `rows`.

        Raises:
            DataError: the columns fit no format, a row is invalid and invalid rows are not to be dropped, or none
                is valid.
        """
        peeked = list(itertools.islice(rows, _PEEK))
        split, problems = Split(name, where), Problems()
        columns = {str(key) for row in peeked if isinstance(row.values, dict) for key in row.values}
        shape = self._shape(columns, where) if columns else None
        for row in itertools.chain(peeked, rows):
            try:
                split.examples.append(self._example(row, shape))
            except InvalidRow as problem:
                problems.add(split.rows, row.place, problem)
            split.rows += 1
        problems.settle(self.on_invalid, split.rows)
        split.drops += problems.reasons
        if not split.examples:
            raise DataError(f"{where}: no usable example in {split.rows} rows ({counted(split.drops)})")
        return split

    def _shape(self, columns: Set[str], where: str) -> str:
        shape = choose_shape(self.format, columns, self.columns, where)
        self.found = self.found or shape
        return shape

    def _example(self, row: Row, shape: str | None) -> Example:
        if isinstance(row.values, InvalidRow):
            raise row.values
        if shape is None:
            raise InvalidRow("missing column", "no columns in it or in the first rows; rows need named columns")
        example = SHAPES[shape].parse(rename(row.values, self.columns))
        if self.system_prompt is not None and not example.messages:
            raise DataError(f"{row.place}: plain text has no system turn; remove data.system_prompt or use messages")
        self.notices[_TRIMMED] += example.trimmed
        return replace(add_system(example, self.system_prompt), place=row.place)


def counted(reasons: Mapping[str, int]) -> str:
    """`reasons` as "reason: count", most frequent first."""
    return ", ".join(f"{reason}: {n}" for reason, n in sorted(reasons.items(), key=lambda each: (-each[1], each[0])))
