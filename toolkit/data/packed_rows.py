"""An encoded row as plain values and back, for a file of rows.

pickle takes three times as long for an array of a few tokens as for its bytes, and twice the room.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from toolkit.data.encode import Encoded, EncodedRow

__all__ = ["pack_row", "unpack_row"]


def pack_row(row: EncodedRow) -> tuple[Any, ...]:
    """The row as tuples, text and bytes."""
    examples = [(each.place, each.ids.tobytes(), each.trained.tobytes(), each.held_out) for each in row.examples]
    return (examples, row.turns, row.thoughts, row.dropped_thoughts, row.enders)


def unpack_row(stored: tuple[Any, ...]) -> EncodedRow:
    """The row that `pack_row` was given."""
    examples, *counts = stored
    return EncodedRow(
        tuple(
            Encoded(place, np.frombuffer(ids, dtype=np.int32), np.frombuffer(trained, dtype=np.bool_), held_out)
            for place, ids, trained, held_out in examples
        ),
        *counts,
    )
