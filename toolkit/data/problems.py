"""One unusable row, as a value: why it cannot be used, and the sentence a person reads.

Rows are judged in several places (file, shape, template, tokens) and either all refused or all counted, so a problem
travels beside its row instead of ending the run where it is found.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from toolkit.errors import DataError

__all__ = ["JSON", "KEY_TWICE", "InvalidRow", "Problems", "listed", "printable"]

KEY_TWICE = "a key twice"


class InvalidRow(Exception):
    """A row that cannot be used.

    Args:
        reason: short and the same for all rows of the kind; drops are counted under it.
        detail: what is wrong with this row and what to do, without the place.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Problems:
    """The unusable rows of one split: counted by reason, the earliest one remembered."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._first: tuple[int, str, str] = (sys.maxsize, "", "")

    def add(self, index: int, place: str, problem: InvalidRow) -> None:
        """Count `problem` of the row number `index`, found at `place`."""
        self.reasons[problem.reason] += 1
        self._first = min(self._first, (index, place, problem.detail))

    @property
    def advice(self) -> str:
        """How to see one of those that were dropped; empty where there is none."""
        return "; data.on_invalid: error names the first" if self.reasons else ""

    def settle(self, on_invalid: Literal["error", "drop"], rows: int) -> None:
        """Refuse the split of `rows` rows if there was a problem and problems are not to be dropped.

        Raises:
            DataError: the first problem, with its file:line and how many rows share its fate.
        """
        total = self.reasons.total()
        if not total or on_invalid == "drop":
            return
        _, place, detail = self._first
        others = f"the first of {total} unusable rows" if total > 1 else "the only unusable row"
        raise DataError(
            f"{place}: {printable(detail, most=600)} ({others} of {rows}; data.on_invalid: drop leaves such rows out)"
        )


def listed(names: Iterable[str], most: int = 12) -> str:
    """`names` in one line, at most `most` of them."""
    every = [printable(name) for name in names]
    return ", ".join(every[:most]) + (f", … ({len(every)} in all)" if len(every) > most else "")


def printable(text: str, most: int = 60) -> str:
    """`text` in one line without control characters, at most `most` characters: it comes from somebody's file."""
    shown = text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise InvalidRow(KEY_TWICE, f"the key {printable(twice)!r} stands twice in one object; keep one of them")
    return made


JSON = json.JSONDecoder(object_pairs_hook=_unique)
"""Reads JSON as `json.loads` does, and raises `InvalidRow` where a key stands twice: Python keeps the last one."""
