"""What a data set came to, counted and as frozen values: rows, drops, tokens, lengths.

Everything here can be written as JSON, so the same figures stand in the preview, the run folder and the run's page.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from toolkit.data.encode import EncodedRow
from toolkit.data.formats import Example
from toolkit.data.pairs import PAIRS, UNPAIRED
from toolkit.data.reading import DataSource, Split

__all__ = ["DataReport", "LengthBin", "SourceReport", "SplitReport", "length_bins", "source_reports", "summarise"]

_MOST_BINS = 10


@dataclass(frozen=True, slots=True)
class LengthBin:
    """How many examples have `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, slots=True)
class SplitReport:
    """One split: rows read, rows kept, drops by reason, tokens kept, tokens trained, lengths.

    `turns` are trained answers. `split` rows became several examples, one for each turn that later renderings change,
    and `examples` are all there are. `thoughts` are trained, `dropped_thoughts` left out as the recipe wants it.
    `enders` says how many answers end in which token.
    """

    rows: int
    kept: int
    drops: Mapping[str, int]
    tokens: int
    trained_tokens: int
    lengths: tuple[LengthBin, ...]
    examples: int = 0
    turns: int = 0
    split: int = 0
    thoughts: int = 0
    dropped_thoughts: int = 0
    enders: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One of several data sets: its rows, its usable training examples, and what one epoch sees of it.

    `seen` counts an example as often as the weight repeats it; `tokens` and `trained_tokens` are of those.
    """

    path: str
    weight: float
    rows: int
    examples: int
    seen: int
    tokens: int
    trained_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.path}, weight {self.weight:g}: an epoch sees {self.seen} of {self.examples} examples in "
            f"{self.rows} rows, {self.tokens} tokens, {self.trained_tokens} trained"
        )


@dataclass(frozen=True, slots=True)
class DataReport:
    """The whole data set.

    `overlap` counts validation examples whose prompt is also a training prompt; `notices` what deserves a look, with
    the number of examples it concerns; `examples` the first few source places kept for training; `sources` the
    training data sets where there are several.
    """

    format: str
    splits: Mapping[str, SplitReport]
    overlap: int
    notices: Mapping[str, int]
    examples: tuple[str, ...]
    sources: tuple[SourceReport, ...] = ()

    @property
    def pairs(self) -> bool:
        """Whether rows are preference pairs, of which the rejected answers are examples of their own."""
        return self.format == PAIRS

    @property
    def judged(self) -> bool:
        """Whether answers are called good or bad, in pairs or one by one."""
        return self.format in (PAIRS, UNPAIRED)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "format": self.format,
            "splits": {name: _plain(split) for name, split in self.splits.items()},
            "overlap": self.overlap,
            "notices": dict(self.notices),
            "examples": list(self.examples),
            "sources": [asdict(each) for each in self.sources],
        }


def length_bins(lengths: Sequence[int]) -> tuple[LengthBin, ...]:
    """At most ten bins of equal width from the shortest to the longest of `lengths` (tokens); empty ones stay."""
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    width = (high - low) // _MOST_BINS + 1
    counts = np.bincount((np.asarray(lengths) - low) // width)
    return tuple(LengthBin(low + i * width, low + (i + 1) * width - 1, int(n)) for i, n in enumerate(counts))


def _plain(split: SplitReport) -> dict[str, Any]:
    return {**asdict(split), "lengths": [asdict(each) for each in split.lengths]}


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


def summarise(count: int, rows: Sequence[EncodedRow], drops: Mapping[str, int]) -> SplitReport:
    """The figures of one split: `count` rows read, what the usable ones became, and the drops by reason."""
    lengths, enders = array("q"), Counter[str]()
    trained = turns = split = thoughts = dropped = 0
    for row in rows:
        lengths.extend(len(each.ids) for each in row.examples)
        trained += sum(int(each.trained.sum()) for each in row.examples)
        turns += row.turns
        split += len(row.examples) > 1
        thoughts += row.thoughts
        dropped += row.dropped_thoughts
        enders.update(row.enders)
    return SplitReport(
        rows=count,
        kept=len(rows),
        drops=dict(sorted(drops.items())),
        tokens=sum(lengths),
        trained_tokens=trained,
        lengths=length_bins(lengths),
        examples=len(lengths),
        turns=turns,
        split=split,
        thoughts=thoughts,
        dropped_thoughts=dropped,
        enders=dict(sorted(enders.items())),
    )
