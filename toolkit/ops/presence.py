"""A layer's stacks while a computation needs them: those it has, or those its source brings in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["present"]


def present(weights: Any, index_TK: torch.Tensor, *, trains: bool) -> AbstractContextManager[Any]:
    """`weights` with stacks that can be read within the block.

    Forward and backward each ask: between them autograd keeps the description only, never a slot's memory.

    Args:
        weights: `toolkit.quant.ExpertWeights` or anything alike; an attribute `source` is optional.
        trains: whether backward will ask again.
    """
    source = getattr(weights, "source", None)
    found: AbstractContextManager[Any] = nullcontext(weights)
    return found if source is None else source.present(weights, index_TK, trains=trains)
