"""What a data set came to, as frozen values: counts, drops, lengths, and the held-out questions.

Everything here can be written as JSON, so the same figures stand in the preview, the run folder and the run's page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

__all__ = ["DataReport", "HeldOut", "LengthBin", "SourceReport", "SplitReport", "length_bins"]

_MOST_BINS = 10


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out question and its answer.

    `prompt_ids` are exactly the tokens that stand before the answer in training. `answer` is what a perfect generation
    is read as: its text and calls, without thought, special tokens and outer whitespace.
    """

    place: str
    prompt_ids: tuple[int, ...]
    prompt_text: str
    answer: str


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
