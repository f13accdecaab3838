"""Better integers than one pass of error feedback finds: several guesses at each input, several scales for each row.

Feedback commits to the nearest level of every input in turn, which is Babai's nearest plane. The closest point of that
lattice is better, but exponentially dear; this keeps the best few beginnings of a row (K-best sphere decoding) and
starts from several scales, of which the rounding errors are as good as independent. GPTQ libraries stop at one pass.

    O outputs, I inputs of one matrix, N scales a row, M = N·O searches side by side, K beginnings kept of each
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Effort", "decode", "effort_for", "pivot_order", "scales_around"]

_LEVELS = 127.0
_BLOCK = 16
_BUDGET = 1 << 30
_MOST_SCALES, _MOST_KEPT = 33, 16
_LEAST, _MOST = 0.994, 1.014
"""Scales tried, in shares of the one that just avoids clipping: below it the largest weight is off by a level soon,
above it all levels are coarser. Measured on the embedded model among nine such ranges; they lie within 0.9%."""


@dataclass(frozen=True)
class Effort:
    """How many scales are tried for a row, and how many beginnings are kept of each."""

    scales: int
    kept: int


def effort_for(outputs: int, inputs: int) -> Effort | None:
    """What a matrix may cost, None where one pass of feedback is all: N · K · O · I² is bounded, whatever the shape."""
    states = _BUDGET // max(1, outputs * inputs * inputs)
    if states < 2:
        return None
    kept = min(_MOST_KEPT, math.isqrt(states))
    return Effort(min(_MOST_SCALES, states // kept), kept)


def scales_around(scale: torch.Tensor, effort: Effort) -> torch.Tensor:
    """[N, O] from the scales [O] of plain rounding."""
    factors = torch.linspace(_LEAST, _MOST, effort.scales, dtype=scale.dtype, device=scale.device)
    return factors[:, None] * scale


def pivot_order(hessian: torch.Tensor) -> torch.Tensor:
    """An order [I] to decide inputs in under H [I, I]: always leave the input for last that then has least left over.

    Pivoted Cholesky from the end. It evens out what the steps of a search cost, where plain feedback wastes most.
    """
    rest = hessian.clone()
    remaining = rest.diagonal().clone()
    order = torch.empty(len(rest), dtype=torch.long, device=rest.device)
    for position in range(len(rest) - 1, -1, -1):
        pivot = remaining.argmin(0, keepdim=True)  # a tensor throughout: as a number it would be waited for
        order[position : position + 1] = pivot
        least = rest.diagonal().gather(0, pivot).clamp_min(torch.finfo(rest.dtype).tiny)
        column = rest.index_select(1, pivot).squeeze(1) / least.sqrt()
        rest.addr_(column, column, alpha=-1)
        remaining = torch.where(remaining.isinf(), remaining, rest.diagonal())
        remaining.index_fill_(0, pivot, torch.inf)
    return order


def decode(weight: torch.Tensor, scale: torch.Tensor, feedback: torch.Tensor, kept: int) -> torch.Tensor:
    """Integers [N, O, I] as floats for weights [O, I] at scales [N, O], inputs decided in order.

    Args:
        feedback: the upper U [I, I] with H⁻¹ = UᵀU, H in that order of inputs, damped.
        kept: K.
    """
    beam = _Beam(weight.repeat(len(scale), 1), scale.reshape(-1, 1), kept)
    inputs = weight.shape[-1]
    for start in range(0, inputs, _BLOCK):
        beam.block(feedback[start : start + _BLOCK, start:])
    return beam.best().view(*scale.shape, inputs)


class _Beam:
    """M searches; of each the k best beginnings, k growing to K.

    `ahead` is what the inputs to come should be rounded from, [M·k, I'], up to date at the start of each block; within
    a block each beginning knows its errors there and which row of `ahead` it came from.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, kept: int) -> None:
        self.kept, self.scale = kept, scale
        self.ahead = weight
        self.cost = torch.zeros_like(scale)
        self.levels: list[torch.Tensor] = []
        self.parents: list[torch.Tensor] = []

    def block(self, feedback: torch.Tensor) -> None:
        """Decide the next inputs: U's rows of them [b, I'], from its diagonal on."""
        width = len(feedback)
        near = self.ahead[:, :width].t().contiguous()
        origin = torch.arange(self.ahead.shape[0], device=near.device)
        errors = torch.empty((len(origin), width), dtype=near.dtype, device=near.device)
        for column in range(width):
            value = near[column].take(origin)
            if column:
                value = value.addmv(errors[:, :column], feedback[:column, column], alpha=-1)
            error, rows = self._decide(value.view(self.cost.shape), feedback[column, column])
            errors, origin = errors.index_select(0, rows), origin.take(rows)
            errors[:, column] = error
        self.ahead = self.ahead[:, width:].index_select(0, origin).addmm_(errors, feedback[:, width:], alpha=-1)

    def _decide(self, value: torch.Tensor, diagonal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round [M, k] values down and up, keep the best: errors and the rows they came from, each [M·k']."""
        count = value.shape[1]
        exact = value / self.scale
        nearest = exact.round().clamp_(-_LEVELS, _LEVELS)
        other = nearest + torch.where(exact >= nearest, 1.0, -1.0)
        level = torch.cat([nearest, other], dim=1)
        error = (exact.repeat(1, 2) - level) * (self.scale / diagonal)
        cost = (self.cost.repeat(1, 2) + error.square()).masked_fill_(level.abs() > _LEVELS, torch.inf)
        self.cost, chosen = cost.topk(min(self.kept, 2 * count), dim=1, largest=False)
        parent = chosen % count
        self.levels.append(level.gather(1, chosen).to(torch.int8))
        self.parents.append(parent.to(torch.uint8))
        rows = parent + count * torch.arange(len(value), device=value.device)[:, None]
        return error.gather(1, chosen).flatten(), rows.flatten()

    def best(self) -> torch.Tensor:
        """The cheapest integers of every search, [M, I], followed back from the end."""
        place, found = self.cost.argmin(dim=1, keepdim=True), []
        for level, parent in zip(reversed(self.levels), reversed(self.parents), strict=True):
            found.append(level.gather(1, place))
            place = parent.gather(1, place).long()
        return torch.cat(found[::-1], dim=1).float()
