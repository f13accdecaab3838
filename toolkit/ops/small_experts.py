"""Products of rows with small experts, many experts in one call: beside products so small each call counts.

Experts that are hit are multiplied out, some at a time, in the order of the routing, so that a block's are the first of
them. torch shares a batch among the cores.

    N rows of a block, padded, G experts of it, E experts, O outputs, I inputs, R rank
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toolkit.ops.equal_rows import EqualBlock, EqualRouting
from toolkit.ops.experts import ExpertStack
from toolkit.ops.factors import LoraFactors
from toolkit.ops.rows import RowBlock, is_fake
from toolkit.ops.split_int8 import SplitRows
from toolkit.ops.stack import FactorGradients, spread_out

__all__ = ["SmallGradients", "SmallProducts", "experts_at_a_time"]

_MOST_WEIGHTS, _MOST_WEIGHTS_BF16 = 1 << 17, 1 << 19
"""Of an expert: beside products with larger ones calls do not count. In bf16 products are faster and calls slower."""
_FEWEST_ROWS = 4
"""Of an expert, on average: of fewer, padding and multiplying out would take longer than calls do."""
_GROUP = 1 << 21
"""Weights that are multiplied out at a time."""


def experts_at_a_time(stacks: Sequence[ExpertStack], rows: int, dtype: torch.dtype) -> int:
    """How many experts of these `SmallProducts` should multiply out for so many rows of this type; 0: it should not."""
    most = _MOST_WEIGHTS_BF16 if dtype == torch.bfloat16 else _MOST_WEIGHTS
    weights = max(stack.outputs * stack.inputs for stack in stacks)
    experts, device = stacks[0].experts, stacks[0].weight.device.type
    is_worth = device == "cpu" and weights <= most and rows >= _FEWEST_ROWS * experts
    return max(1, _GROUP // weights) if is_worth else 0


class SmallProducts:
    """As `stack.Products`, of blocks that are an `EqualBlock`, in the routing's order of the experts.

    Args:
        stack: as it is stored.
        lora: its factors; None where it is not adapted.
        routing: of all blocks.
    """

    def __init__(self, stack: ExpertStack, lora: LoraFactors | None, routing: EqualRouting) -> None:
        self._stack, self._experts = stack, routing.experts
        self._scale_E1O, self._bias_E1O = (
            None if each is None else each.index_select(0, routing.experts).unsqueeze(1)
            for each in (stack.row_scale, stack.bias)
        )
        self.A = None if lora is None else lora.A[routing.experts]
        self.B = None if lora is None else lora.B[routing.experts]
        self._scaling = 1.0 if lora is None else lora.scaling
        self._group: slice | None = None
        self._weight_GOI = stack.weight.new_empty(0)

    @property
    def outputs(self) -> int:
        """O."""
        return self._stack.outputs

    def split_rows(self, x_TI: torch.Tensor) -> SplitRows | None:
        """None: weights so small are multiplied in x's type."""
        return None

    def forward(self, x_NI: torch.Tensor, block: RowBlock, split_rows: SplitRows | None = None) -> torch.Tensor:
        """x Wᵀ + b and the update: [N, O]."""
        experts, x_GNI = _batch(block, x_NI)
        y_GNO = torch.bmm(x_GNI, self._weight(block, x_NI.dtype).mT)
        if self._scale_E1O is not None:
            y_GNO.mul_(self._scale_E1O[experts])
        if self._bias_E1O is not None:
            y_GNO.add_(self._bias_E1O[experts].to(y_GNO.dtype))
        if self.A is not None and self.B is not None:
            A_GRI, B_GOR = (each[experts].to(x_NI.dtype) for each in (self.A, self.B))
            y_GNO.baddbmm_(torch.bmm(x_GNI, A_GRI.mT), B_GOR.mT, alpha=self._scaling)
        return y_GNO.flatten(0, 1)

    def backward(
        self,
        x_NI: torch.Tensor,
        grad_NO: torch.Tensor,
        block: RowBlock,
        weight_N1: torch.Tensor | None = None,
        *,
        needs_input: bool = True,
    ) -> tuple[torch.Tensor | None, list[FactorGradients]]:
        """Gradients of the input [N, I] and of the factors, A's [G, R, I] and B's transposed [G, R, O].

        Args as of `Products.backward`.
        """
        (experts, x_GNI), (_, grad_GNO) = _batch(block, x_NI), _batch(block, grad_NO)
        grad_GNI = self._input_product(grad_GNO, block) if needs_input else None
        if self.A is None or self.B is None:
            return None if grad_GNI is None else grad_GNI.flatten(0, 1), []
        low_GNR = torch.bmm(x_GNI, self.A[experts].mT).mul_(self._scaling)
        grad_GNR = torch.bmm(grad_GNO, self.B[experts]).mul_(self._scaling)
        if grad_GNI is not None:
            grad_GNI.baddbmm_(grad_GNR, self.A[experts])
        if weight_N1 is not None:
            weight_GN1 = weight_N1.view(*grad_GNR.shape[:2], 1)
            low_GNR.mul_(weight_GN1)
            grad_GNR.mul_(weight_GN1)
        factors = torch.bmm(grad_GNR.mT, x_GNI), torch.bmm(low_GNR.mT, grad_GNO)
        return None if grad_GNI is None else grad_GNI.flatten(0, 1), [factors]

    def bias_products(self, grad_NH: torch.Tensor, block: RowBlock) -> torch.Tensor | None:
        """⟨b, g⟩ of every row [N]; None where there is no bias."""
        if self._bias_E1O is None:
            return None
        experts, grad_GNH = _batch(block, grad_NH)
        return (grad_GNH * self._bias_E1O[experts].to(grad_NH.dtype)).sum(-1).flatten()

    def gradients(self, idle: list[int]) -> SmallGradients:
        """Of the factors, zero until blocks are added."""
        A, B = (
            None if each is None else each.new_zeros(self._stack.experts, *each.shape[1:]) for each in (self.A, self.B)
        )
        return SmallGradients(A, B, self._experts)

    def _input_product(self, grad_GNO: torch.Tensor, block: RowBlock) -> torch.Tensor:
        if self._scale_E1O is not None:
            experts, _ = _batch(block, grad_GNO)
            grad_GNO = torch.mul(grad_GNO, self._scale_E1O[experts], out=torch.empty_like(grad_GNO))
        return torch.bmm(grad_GNO, self._weight(block, grad_GNO.dtype))

    def _weight(self, block: RowBlock, dtype: torch.dtype) -> torch.Tensor:
        """The experts' weights without their scale [G, O, I], multiplied out once for all blocks of a group."""
        assert isinstance(block, EqualBlock)
        if self._group != block.group:
            stack, experts = self._stack, self._experts[block.group]
            if is_fake(stack.weight):
                self._weight_GOI = stack.weight.new_empty(len(experts), stack.outputs, stack.inputs, dtype=dtype)
            else:
                part = spread_out(stack.chosen(experts))
                assert not part.four_bits
                self._weight_GOI = (part.weight.mT if part.is_transposed else part.weight).to(dtype)
            self._group = block.group
        return self._weight_GOI[: block.experts.stop - block.experts.start]


@dataclass(frozen=True)
class SmallGradients:
    """As `stack.StackGradients`: A [E, R, I] and B [E, O, R], zero until blocks are added; the routing's experts."""

    A: torch.Tensor | None
    B: torch.Tensor | None
    experts: torch.Tensor

    def take(self, block: RowBlock, found: list[FactorGradients]) -> list[FactorGradients | None]:
        """All wait for their turn: an expert's rows are in several blocks."""
        return list(found)

    def add(self, block: RowBlock, waiting: list[FactorGradients | None]) -> None:
        """Add what one block of rows gives."""
        assert isinstance(block, EqualBlock)
        experts = self.experts[block.experts]
        for gradients in waiting:
            if gradients is not None and self.A is not None and self.B is not None:
                grad_A, grad_Bt = gradients
                self.A.index_add_(0, experts, grad_A)
                self.B.index_add_(0, experts, grad_Bt.mT)


def _batch(block: RowBlock, rows_NI: torch.Tensor) -> tuple[slice, torch.Tensor]:
    """Which of the routing's experts a block has, and its rows by expert [G, N / G, I]."""
    assert isinstance(block, EqualBlock)
    return block.experts, block.batch(rows_NI)
