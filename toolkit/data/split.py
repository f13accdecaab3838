"""Held-out examples, by prompt and by group: an example whose like was trained on measures memory, not learning.

`datasets.train_test_split` draws rows, so that duplicates fall on both sides; scikit-learn's group splitters know one
kind of group, and rows that share a prompt with one and a group with another hang together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    groups_of = _components(training.examples)
    held = _draw(groups_of, target, seed)
    taken = int(held.sum())
    if not taken or taken == total or target >= total:
        groups = f"{groups_of.max() + 1} different prompts"
        if any(example.group for example in training.examples):
            groups = f"{groups_of.max() + 1} groups that share no prompt and no value of data.group_by"
        raise DataError(
            f"{training.where}: data.validation_size={size} cannot be held out of {total} examples with {groups}; "
            "both sides need some; give data.validation or another size"
        )
    validation = Split("validation", training.where, rows=taken)
    validation.examples = chosen(training.examples, held)
    training.examples = chosen(training.examples, np.invert(held))
    training.rows -= taken
    return validation


def overlap(training: Iterable[Example], validation: Iterable[Example]) -> int:
    """How many validation examples have a prompt that is also a training prompt."""
    held = Counter(example.key for example in validation)
    return sum(held[key] for key in {example.key for example in training if example.key in held})


def group_overlap(training: Iterable[Example], validation: Iterable[Example]) -> int:
    """How many validation examples have a value of `data.group_by` that is also a training example's."""
    held = Counter(example.group for example in validation if example.group is not None)
    return sum(held[group] for group in {example.group for example in training if example.group in held} if group)


def _components(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Of each example, the number of those that hang together with it by prompts and groups, over any number of steps.

    Numbers are in the order of first appearance.
    """
    hashes = bytearray()
    for example in examples:
        hashes += example.key
    keys = _numbered(np.frombuffer(hashes, dtype="S16"))
    groups = [example.group for example in examples]
    if not any(groups):
        return keys
    leader: dict[int | bytes, int | bytes] = {}

    def find(name: int | bytes) -> int | bytes:
        path = []
        while (above := leader.setdefault(name, name)) != name:
            path.append(name)
            name = above
        leader.update(dict.fromkeys(path, name))
        return name

    for key, group in zip(keys.tolist(), groups, strict=True):
        if group is not None:
            leader[find(group)] = find(key)
    numbers: dict[int | bytes, int] = {}
    return np.asarray([numbers.setdefault(find(key), len(numbers)) for key in keys.tolist()])


def _numbered(names: NDArray[Any]) -> NDArray[np.int64]:
    """The same number for the same name, in the order of first appearance."""
    _, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _draw(groups: NDArray[np.int64], target: int, seed: int) -> NDArray[np.bool_]:
    """Which examples are held out: whole groups, drawn while they fit."""
    sizes = np.bincount(groups)
    taken = np.zeros(len(sizes), dtype=np.bool_)
    room = target
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[group] <= room:
            taken[group] = True
            room -= int(sizes[group])
        if not room:
            break
    return taken[groups]
