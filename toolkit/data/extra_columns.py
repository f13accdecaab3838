"""Columns that a row's format does not read: left aside and counted, or refused where the row would mean another thing.

Other tools read many of them. Learning from such a row as if they were not there would be another training than the
data's author meant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from typing import Any

from toolkit.data.problems import InvalidRow, printable

__all__ = ["LEFT_OUT", "ExtraColumns", "carries"]

LEFT_OUT = "weight 0 or train: false"

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


class ExtraColumns:
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


def carries(value: Any) -> bool:
    """Whether a value says anything: Arrow's tables hold empty lists and nulls where a row has nothing."""
    if isinstance(value, (list, tuple)):
        return any(map(carries, value))
    if isinstance(value, Mapping):
        return any(map(carries, value.values()))
    return value is not None and value != ""


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
    aside = f"or leave the column aside: data.remove_columns: [{name}]"
    if name in _MEDIA:
        raise InvalidRow("more than text", f"{name}: the row has more than text; take text rows, {aside}")
    if name in _PAIR:
        raise InvalidRow(
            "a preference pair", f"{name}: a better and a worse answer; here one answer is learnt; {aside}"
        )
    if value is False and name in _VERDICTS:
        raise InvalidRow(
            "an answer marked as bad", f"{name} says that the answer is a bad one; remove the row, {aside}"
        )
