"""A checkpoint as it lies on a disk or on the Hub: its true bytes and dtypes, from headers where they can be read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.checkpoint.files import METHOD, Header, declared_format, here, stored_headers
from toolkit.errors import HubError
from toolkit.plan.budget import Budget
from toolkit.plan.shapes import Shapes, is_published, stored_method

__all__ = ["Stored", "what_is_stored"]

_BITS = {None: 16.0, "mxfp4": 4.25}
"""Bits of a stored expert weight: MXFP4 has a scale of one byte for 32 values of four bits."""


@dataclass(frozen=True)
class Stored:
    """Bytes of the files, by dtype where headers say them; whether they are on this machine, and in our int8."""

    bytes: int
    dtypes: Mapping[str, int] = field(default_factory=dict)
    is_here: bool = False
    is_int8: bool = False
    note: str = ""


def what_is_stored(budget: Budget) -> Stored:
    """Of the budget's model: a folder, a snapshot in the Hub's cache, or headers on the Hub.

    A published model is not asked for: its size follows from its shapes. Where the Hub cannot be reached, 16 bit are
    taken, and said.

    Raises:
        ModelError: wrong shapes, a format that cannot be read, damaged or missing shards, or no safetensors.
    """
    name, revision = budget.name, budget.revision
    folder = here(name, revision)
    if folder is None and is_published(name, revision):
        return Stored(_reckoned(budget.shapes, stored_method(name)))
    declared = None if is_published(name, revision) else declared_format(name, budget.model.config)
    try:
        headers = stored_headers(folder or name, revision)
    except HubError:
        note = "download: estimated at 16 bits per parameter; the Hub did not return the headers"
        return Stored(_reckoned(budget.shapes, None), note=note)
    if not is_published(name, revision):
        _refuse_wrong_shapes(budget, headers, folder, declared)
    dtypes: Counter[str] = Counter()
    for header in headers:
        dtypes[header.dtype] += header.bytes
    is_int8 = declared is not None and declared["quant_method"] == METHOD
    return Stored(sum(dtypes.values()), dict(dtypes), folder is not None, is_int8)


def _refuse_wrong_shapes(
    budget: Budget, headers: Sequence[Header], folder: Path | None, declared: Mapping[str, Any] | None
) -> None:
    """Of weights that others quantised only where the files are here: their parts have shapes of their own."""
    from toolkit.checkpoint.conversion import refuse_wrong_shapes
    from toolkit.checkpoint.stacks import plain_weights, shapes_in

    shapes = {tensor.name: tensor.shape for tensor in headers}
    if declared is not None and declared["quant_method"] != METHOD:
        weights = {} if folder is None else plain_weights(budget.name, folder, declared, budget.model)
        shapes = {key: shape for key, (shape, _) in shapes_in(weights).items()}
    refuse_wrong_shapes(budget.name, budget.model, shapes.items())


def _reckoned(shapes: Shapes, method: str | None) -> int:
    """Bytes with expert weights in the method's bits and everything else in 16."""
    stacks = sum(math.prod(shapes.parameters[name]) for layer in shapes.architecture.layers for name in layer.stacks)
    rest = sum(map(math.prod, shapes.parameters.values())) - stacks
    return int(stacks * _BITS[method] / 8) + 2 * rest
