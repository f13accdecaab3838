"""Held-out examples, by prompt: an example whose prompt was trained on measures memory, not learning.

`datasets.train_test_split` and scikit-learn's splitters draw rows, so that duplicates fall on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from toolkit.data.formats import Example
from toolkit.data.reading import Split
from toolkit.errors import DataError

__all__ = ["overlap", "set_apart"]


def set_apart(training: Split, size: float | int, seed: int) -> Split:
    """Take whole groups of equal prompts out of `training`, about `size` of its examples, and return them.

    Args:
        training: changed in place: its examples and rows shrink by what is held out.
        size: a share below 1, or a number of examples. Groups are drawn with `seed` and never exceed it.

    Raises:
        DataError: one of the sides would be empty.
    """
    total = len(training.examples)
    target = size if isinstance(size, int) else max(1, round(size * total))
    keys = [example.key for example in training.examples]
    held = _draw(keys, target, seed)
    taken = sum(key in held for key in keys)
    if not taken or taken == total or target >= total:
        groups = len(set(keys))
        raise DataError(
            f"{training.where}: data.validation_size={size} cannot be held out of {total} examples with {groups} "
            "different prompts; both sides need some; give data.validation or another size"
        )
    validation = Split("validation", training.where, rows=taken)
    validation.examples = [each for each, key in zip(training.examples, keys, strict=True) if key in held]
    training.examples = [each for each, key in zip(training.examples, keys, strict=True) if key not in held]
    training.rows -= taken
    return validation


def overlap(training: Iterable[Example], validation: Iterable[Example]) -> int:
    """How many validation examples have a prompt that is also a training prompt."""
    seen = {example.key for example in training}
    return sum(example.key in seen for example in validation)


def _draw(keys: list[bytes], target: int, seed: int) -> set[bytes]:
    groups = Counter(keys)
    names = list(groups)
    held: set[bytes] = set()
    room = target
    for index in np.random.default_rng(seed).permutation(len(names)):
        if groups[names[index]] <= room:
            held.add(names[index])
            room -= groups[names[index]]
        if not room:
            break
    return held
