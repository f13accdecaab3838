"""Examples that stand more than once, in the training data or on both sides: left out on request, or counted.

A row that stands twice is learnt twice, which nobody meant; `datasets` has no way to find one across files and formats.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np

from toolkit.data.encode import Encoded
from toolkit.data.reading import Split
from toolkit.data.spool import chosen

__all__ = ["COPIES", "HELD", "copies", "drop_copies", "drop_held_out"]

COPIES = "examples are copies of others; data.dedupe: true leaves them out"
_COPY = "a copy of another example"
HELD = "its prompt is held out"


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


def copies(encoded: Iterable[Encoded]) -> int:
    """How many of the examples have the tokens and the mask of an earlier one."""
    hashes = array("Q")
    for each in encoded:
        digest = hashlib.blake2b(each.ids.tobytes(), digest_size=8)
        digest.update(each.trained.tobytes())
        hashes.frombytes(digest.digest())
    return len(hashes) - len(np.unique(hashes))
