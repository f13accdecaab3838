"""Writing a gradient back through an index in which no place comes twice, where algorithms are to be deterministic.

torch then sorts the index first: twenty-five launches for a router's top-k, which needs three. But the places that a
top-k gives are different in every row, and so are positions that are picked out once each. What is written once is the
same in whatever order.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["write_in_any_order"]

_PICKS = ("TopkBackward0", "IndexSelectBackward0")
_DEEPEST = 6
"""Operators between a top-k and the weights that come of it: a division, a scale, a cast."""


def write_in_any_order(picked: torch.Tensor) -> None:
    """Spare the backward of the top-k that gave these weights, or of the rows that were picked, the sort.

    Nothing changes where neither is close by. The caller knows that no row was picked twice.
    """
    if not torch.are_deterministic_algorithms_enabled() or picked.grad_fn is None:
        return
    nodes = [picked.grad_fn]
    for _ in range(_DEEPEST):
        for node in nodes:
            if node.name() in _PICKS:
                order = _Order()
                node.register_prehook(order.leave)
                node.register_hook(order.restore)
                return
        nodes = [after for node in nodes for after, _ in node.next_functions if after is not None]


class _Order:
    """The process's setting, left while one node of a graph runs."""

    def leave(self, grads: Any) -> None:
        """Before it."""
        self.kept = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(False)

    def restore(self, grads: Any, given: Any) -> None:
        """After it."""
        torch.use_deterministic_algorithms(self.kept[0], warn_only=self.kept[1])
