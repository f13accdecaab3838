"""Held-out examples, by prompt and by group: an example whose like was trained on measures memory, not learning.

`datasets.train_test_split` draws rows, so that duplicates fall on both sides; scikit-learn's group splitters know one
kind of group, and rows that share a prompt with one and a group with another hang together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from toolkit.data.formats import Example
from toolkit.data.reading import Split
from toolkit.data.spool import chosen
from toolkit.errors import DataError

__all__ = ["group_overlap", "overlap", "set_apart"]


def set_apart(training: Split, size: float | int, seed: int) -> Split:
    """Take whole groups out of `training`, about `size` of its examples, and return them.

    Examples with the same prompt, or the same value of `data.group_by`, are in one group.

    Args:
        training: changed in place: its examples and rows shrink by what is held out.
        size: a share below 1, or a number of examples. Groups are drawn with `seed` and never exceed it.

    Raises:
        DataError: one of the sides would be empty.
    """
    total = len(training.examples)
    target = size if isinstance(size, int) else max(1, round(size * total))
    keys = _components(training.examples)
    held = _draw(keys, target, seed)
    taken = sum(key in held for key in keys)
    if not taken or taken == total or target >= total:
        groups = f"{len(set(keys))} different prompts"
        if any(example.group for example in training.examples):
            groups = f"{len(set(keys))} groups that share no prompt and no value of data.group_by"
        raise DataError(
            f"{training.where}: data.validation_size={size} cannot be held out of {total} examples with {groups}; "
            "both sides need some; give data.validation or another size"
        )
    validation = Split("validation", training.where, rows=taken)
    validation.examples = chosen(training.examples, [key in held for key in keys])
    training.examples = chosen(training.examples, [key not in held for key in keys])
    training.rows -= taken
    return validation


def overlap(training: Iterable[Example], validation: Iterable[Example]) -> int:
    """How many validation examples have a prompt that is also a training prompt."""
    seen = {example.key for example in training}
    return sum(example.key in seen for example in validation)


def group_overlap(training: Iterable[Example], validation: Iterable[Example]) -> int:
    """How many validation examples have a value of `data.group_by` that is also a training example's."""
    seen = {example.group for example in training}
    return sum(example.group is not None and example.group in seen for example in validation)


def _components(examples: Sequence[Example]) -> list[bytes]:
    """Of each example, the name of those that hang together with it by prompts and groups, over any number of steps."""
    names = [(example.key, example.group) for example in examples]
    leader: dict[bytes, bytes] = {}

    def find(name: bytes) -> bytes:
        path = []
        while (above := leader.setdefault(name, name)) != name:
            path.append(name)
            name = above
        leader.update(dict.fromkeys(path, name))
        return name

    for key, group in names:
        if group is not None:
            leader[find(b"group" + group)] = find(key)
    return [find(key) for key, _ in names]


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
