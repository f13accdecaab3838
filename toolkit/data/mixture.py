"""Several data sets as one: each read in its own way, seen as often as its weight says, and mixed evenly.

`datasets.interleave_datasets` draws rows by probability until a set runs out, so that nobody can say how often an
example is seen. Here a weight is that number, and the same seed gives the same rows in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.data.encode import EncodedRow
from toolkit.data.formats import Example
from toolkit.data.reading import Reading, Split
from toolkit.data.report import SourceReport
from toolkit.data.rows import Row
from toolkit.data.spool import Spool
from toolkit.errors import DataError, did_you_mean

__all__ = ["BEYOND", "DataSource", "draw", "read_sources", "require_removed", "source_reports", "sources_of"]

BEYOND = "beyond max_samples"
BELOW_ONE = "not drawn: weight below 1"
_STREAM = 2  # 1 shuffles the examples; the bare seed draws what is held out


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


def sources_of(train: str | Sequence[Mapping[str, Any]]) -> list[DataSource]:
    """`data.train` of a recipe as a list."""
    return [DataSource(train)] if isinstance(train, str) else [DataSource(**each) for each in train]


def read_sources(
    sources: Sequence[DataSource],
    reading: Reading,
    open_: Callable[[DataSource], Iterator[Row]],
    *,
    name: str = "train",
    split: str | None = None,
) -> Split:
    """All examples of `sources`, one after the other, each marked with the number of its set.

    Args:
        sources: the data sets.
        reading: how rows are read where a set does not say; it collects what was found.
        open_: gives the rows of one.
        name: of the split that is made of them.
        split: the split that is read, for messages.

    Raises:
        DataError: one of them cannot be read, or a column to remove is in none.
    """
    examples = Spool[Example](Example.memory)
    whole = Split(name, _where(sources[0].path, split) if len(sources) == 1 else "data.train", examples=examples)
    formats: dict[str, None] = {}
    for number, source in enumerate(sources):
        columns = reading.columns if source.columns is None else source.columns
        own = replace(reading, format=source.format or reading.format, columns=columns, found="")
        part = own.read(name, _where(source.path, split), open_(source), number, examples)
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


def draw(
    examples: Sequence[Example], sources: Sequence[DataSource], seed: int
) -> tuple[NDArray[np.int64], Counter[str]]:
    """Which of `examples` one epoch sees, in the order of an epoch that is not shuffled, and what is not drawn.

    A set of weight w is seen w times: its whole part over and over, and of the rest that share of its examples, drawn
    with the seed and the same in every epoch. Sets are mixed evenly: after any part of the epoch, about that part of
    each has been seen.
    """
    if all(source.weight == 1 and source.max_samples is None for source in sources) and len(sources) == 1:
        return np.arange(len(examples)), Counter()
    drops: Counter[str] = Counter()
    members = np.asarray([example.source for example in examples])
    drawn, places = [], []
    for number, source in enumerate(sources):
        seen = _seen(np.flatnonzero(members == number), source, np.random.default_rng((seed, _STREAM, number)), drops)
        drawn.append(seen)
        places.append((np.arange(len(seen)) + 0.5) / max(len(seen), 1))
    indices, when = np.concatenate(drawn), np.concatenate(places)
    return indices[np.argsort(when, kind="stable")], drops


def _seen(of_set: Any, source: DataSource, random: np.random.Generator, drops: Counter[str]) -> Any:
    """The examples of one set that an epoch sees, as often as it does."""
    chosen = of_set
    if source.max_samples is not None and source.max_samples < len(of_set):
        chosen = of_set[np.sort(random.permutation(len(of_set))[: source.max_samples])]
        drops[BEYOND] += len(of_set) - len(chosen)
    times = int(source.weight)
    rest = int((source.weight - times) * len(chosen) + 0.5)
    rest = max(rest, 1) if not times and len(chosen) else rest
    drops[BELOW_ONE] += 0 if times else len(chosen) - rest
    partly = chosen[np.sort(random.permutation(len(chosen))[:rest])]
    return np.concatenate([np.tile(chosen, times), partly]).astype(np.int64)


def source_reports(
    sources: Sequence[DataSource], training: Split, examples: Sequence[Example], rows: Sequence[EncodedRow]
) -> tuple[SourceReport, ...]:
    """What came of each set: `examples` and their `rows` are what one epoch sees."""
    usable = Counter(example.source for example in training.examples)
    seen: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    trained: Counter[int] = Counter()
    for example, row in zip(examples, rows, strict=True):
        seen[example.source] += 1
        tokens[example.source] += sum(len(each.ids) for each in row.examples)
        trained[example.source] += sum(int(each.trained.sum()) for each in row.examples)
    return tuple(
        SourceReport(source.path, source.weight, training.rows_of[n], usable[n], seen[n], tokens[n], trained[n])
        for n, source in enumerate(sources)
    )


def _where(path: str, split: str | None) -> str:
    return f"{path}[{split}]" if split else path
