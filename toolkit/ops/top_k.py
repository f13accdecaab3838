"""The backward of a router's top-k in three launches, where algorithms are to be deterministic.

torch then writes through an index by sorting it first, which takes twenty-five. But the places that a top-k gives are
different in every row: each is written once, in whatever order, and the sum is the same.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["write_in_any_order"]

_TOP_K = "TopkBackward0"
_DEEPEST = 6
"""Operators between the top-k and the weights that come of it: a division, a scale, a cast."""


def write_in_any_order(weight_TK: torch.Tensor) -> None:
    """Spare the backward of the top-k that gave these weights the sort; nothing where there is none close by."""
    if not torch.are_deterministic_algorithms_enabled() or weight_TK.grad_fn is None:
        return
    nodes = [weight_TK.grad_fn]
    for _ in range(_DEEPEST):
        for node in nodes:
            if node.name() == _TOP_K:
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
