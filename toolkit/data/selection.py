"""Which examples are trained and which held out, how often each is seen, and which stand more than once.

An example whose like was trained on measures memory, not learning, and a row that stands twice is learnt twice, which
nobody meant. `datasets.train_test_split` draws rows, so that duplicates fall on both sides; scikit-learn's group
splitters know one kind of group, and rows that share a prompt with one and a group with another hang together.
`datasets.interleave_datasets` draws by probability until a set runs out, so that nobody can say how often an example
is seen: here a weight is that number, and the same seed gives the same rows in the same order.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.data.encode import Encoded
from toolkit.data.formats import Example
from toolkit.data.reading import DataSource, Split
from toolkit.data.storage import chosen
from toolkit.errors import DataError

__all__ = [
    "BEYOND",
    "COPIES",
    "HELD",
    "copies",
    "draw",
    "drop_copies",
    "drop_held_out",
    "group_overlap",
    "overlap",
    "set_apart",
]

COPIES = "examples are copies of others; data.dedupe: true leaves them out"
_COPY = "a copy of another example"
HELD = "its prompt is held out"

BEYOND = "beyond max_samples"
BELOW_ONE = "not drawn: weight below 1"
_STREAM = 2  # 1 shuffles the examples; the bare seed draws what is held out


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


def drop_copies(split: Split) -> None:
    """Leave out of `split` every example that is the same as an earlier one, and count them as drops."""
    seen: set[bytes] = set()
    new = []
    for identity in (example.identity for example in split.examples):
        new.append(identity not in seen)
        seen.add(identity)
    _keep(split, new, _COPY)


def drop_held_out(split: Split, held: Split) -> None:
    """Leave out of `split` every example whose prompt is also one of `held`, and count them as drops."""
    prompts = {example.key for example in held.examples}
    _keep(split, [example.key not in prompts for example in split.examples], HELD)


def _keep(split: Split, flags: list[bool], reason: str) -> None:
    split.drops[reason] += len(flags) - sum(flags)
    split.examples = chosen(split.examples, flags)


def copies(encoded: Iterable[Sequence[Encoded]]) -> int:
    """How many have the tokens and the masks of an earlier one; each is an example, or a pair's two."""
    hashes = array("Q")
    for one in encoded:
        digest = hashlib.blake2b(digest_size=8)
        for each in one:
            digest.update(each.ids.tobytes())
            digest.update(each.trained.tobytes())
        hashes.frombytes(digest.digest())
    return len(hashes) - len(np.unique(hashes))


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
    taken = of_set
    if source.max_samples is not None and source.max_samples < len(of_set):
        taken = of_set[np.sort(random.permutation(len(of_set))[: source.max_samples])]
        drops[BEYOND] += len(of_set) - len(taken)
    times = int(source.weight)
    rest = int((source.weight - times) * len(taken) + 0.5)
    rest = max(rest, 1) if not times and len(taken) else rest
    drops[BELOW_ONE] += 0 if times else len(taken) - rest
    partly = taken[np.sort(random.permutation(len(taken))[:rest])]
    return np.concatenate([np.tile(taken, times), partly]).astype(np.int64)
