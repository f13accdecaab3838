"""Products with one expert of a stack: int8 weights through a cache-sized buffer, the low-rank update beside them.

N rows of a block, S rows of all, E experts, O outputs, I inputs, R rank
a weight is stored as [O, I], or [I, O] transposed
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from toolkit.ops.factors import LoraFactors
from toolkit.ops.rows import RowBlock, is_imagined
from toolkit.quant import ExpertStack, can_multiply, multiply

__all__ = ["FactorGradients", "Products", "StackGradients"]

FactorGradients = tuple[torch.Tensor, torch.Tensor]
"""Of one expert's A [R, I] and of its B, transposed: [R, O]."""

_BUFFER = 1 << 19
"""Elements of a weight multiplied out at a time on a CPU: about a core's own cache, and wide enough for BLAS."""


@dataclass(frozen=True)
class Products:
    """One projection at work: frozen weights, and LoRA factors A [E, R, I] and B [E, O, R] where it is adapted.

    `low` [S, R] holds x Aᵀ of all rows, which is little and saves backward a product: forward fills it, and it is read
    where `is_known`.
    """

    stack: ExpertStack
    A: torch.Tensor | None
    B: torch.Tensor | None
    scaling: float
    low: torch.Tensor | None
    is_known: bool

    @classmethod
    def of(
        cls, stack: ExpertStack, lora: LoraFactors | None, low: torch.Tensor | None = None, *, is_known: bool = False
    ) -> Products:
        """With each expert's B in one piece: PEFT's layout has a cache line between any two of its numbers."""
        if lora is None:
            return cls(stack, None, None, 1.0, None, is_known)
        return cls(stack, lora.A, lora.B.contiguous(), lora.scaling, low, is_known)

    @property
    def outputs(self) -> int:
        """O."""
        return self.stack.weight.shape[2 if self.stack.is_transposed else 1]

    @property
    def inputs(self) -> int:
        """I."""
        return self.stack.weight.shape[1 if self.stack.is_transposed else 2]

    def forward(self, x_NI: torch.Tensor, block: RowBlock) -> torch.Tensor:
        """x Wᵀ + b and the update: [N, O]."""
        y_NO = self._product(x_NI, block.expert, self.outputs, transposed=not self.stack.is_transposed)
        if self.stack.scale is not None:
            y_NO.mul_(self.stack.scale[block.expert].to(y_NO.dtype))
        if self.stack.bias is not None:
            y_NO.add_(self.stack.bias[block.expert].to(y_NO.dtype))
        if self.A is not None and self.B is not None:
            y_NO.addmm_(self._low(x_NI, self.A[block.expert], block), self.B[block.expert].t(), alpha=self.scaling)
        return y_NO

    def backward(
        self,
        x_NI: torch.Tensor,
        grad_NO: torch.Tensor,
        block: RowBlock,
        weight_N1: torch.Tensor | None = None,
        *,
        needs_input: bool = True,
    ) -> tuple[torch.Tensor | None, FactorGradients | None]:
        """Gradients of the input, grad W and the update's share [N, I], and of the factors.

        Args:
            weight_N1: what each row's gradient still has to be multiplied with. The factors' gradients take it in; the
                input's leaves it out.
            needs_input: whether the first is wanted.
        """
        grad_NI = self._input_product(grad_NO, block.expert) if needs_input else None
        if self.A is None or self.B is None:
            return grad_NI, None
        A_RI = self.A[block.expert]
        low_NR = self._low(x_NI, A_RI, block) * self.scaling
        grad_NR = (grad_NO @ self.B[block.expert]).mul_(self.scaling)
        if grad_NI is not None:
            grad_NI.addmm_(grad_NR, A_RI)
        if weight_N1 is not None:
            low_NR.mul_(weight_N1)
            grad_NR.mul_(weight_N1)
        # B's as [R, O]: BLAS is twice as fast at few rows as at few columns.
        return grad_NI, (grad_NR.t() @ x_NI, low_NR.t() @ grad_NO)

    def _low(self, x_NI: torch.Tensor, A_RI: torch.Tensor, block: RowBlock) -> torch.Tensor:
        if self.low is not None and self.is_known:
            return block.pad(self.low[block.rows])
        low_NR = x_NI @ A_RI.t()
        if self.low is not None:
            self.low[block.rows] = low_NR[: block.count]
        return low_NR

    def _input_product(self, grad_NO: torch.Tensor, expert: int) -> torch.Tensor:
        scaled = grad_NO if self.stack.scale is None else grad_NO * self.stack.scale[expert].to(grad_NO.dtype)
        return self._product(scaled, expert, self.inputs, transposed=self.stack.is_transposed)

    def _product(self, x: torch.Tensor, expert: int, width: int, *, transposed: bool) -> torch.Tensor:
        """x times an expert's stored weight [P, Q], or times its transpose, scale left out: [N, width]."""
        if can_multiply(x, self.stack.weight):
            return multiply(x, self.stack.weight[expert], transposed=transposed)
        result = x.new_empty(x.shape[0], width)
        for rows, block in self._blocks(expert, x.dtype):
            if transposed:
                torch.mm(x, block.t(), out=result[:, rows])
            elif rows.start == 0:
                torch.mm(x[:, rows], block, out=result)
            else:
                result.addmm_(x[:, rows], block)
        return result

    def _blocks(self, expert: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of an expert's stored weight in the compute dtype, each block in the place of the last."""
        weight = self.stack.weight[expert]
        if weight.dtype == dtype:
            yield slice(0, weight.shape[0]), weight
            return
        step = max(1, _BUFFER // weight.shape[1]) if weight.device.type == "cpu" else weight.shape[0]
        elements, reuses = min(step, weight.shape[0]) * weight.shape[1], not is_imagined(weight)
        buffer = _buffer(elements, dtype, weight.device) if reuses else weight.new_empty(elements, dtype=dtype)
        for start in range(0, weight.shape[0], step):
            rows = slice(start, min(start + step, weight.shape[0]))
            part = weight[rows]
            yield rows, buffer[: part.numel()].view(part.shape).copy_(part)


_kept = threading.local()


def _buffer(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Room that is overwritten by the thread's next call. On a CPU the same memory, warm, every time."""
    if device.type != "cpu":
        return torch.empty(elements, dtype=dtype, device=device)
    buffer: torch.Tensor | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.dtype != dtype or buffer.numel() < elements:
        with torch.inference_mode(False):
            buffer = _kept.buffer = torch.empty(elements, dtype=dtype)
    return buffer[:elements]


@dataclass(frozen=True)
class StackGradients:
    """Gradients of all experts' factors, A [E, R, I] and B [E, O, R]; zero where an expert was not hit."""

    A: torch.Tensor | None
    B: torch.Tensor | None

    @classmethod
    def of(cls, products: Products, idle: list[int]) -> StackGradients:
        """To be filled for every expert but those in `idle`; nothing where the projection is not adapted."""
        if products.A is None or products.B is None:
            return cls(None, None)
        A, B = products.A.new_empty(products.A.shape), products.B.new_empty(products.B.shape)
        A[idle], B[idle] = 0, 0
        return cls(A, B)

    def take(self, block: RowBlock, found: FactorGradients | None) -> FactorGradients | None:
        """Write at once what nothing else is added to; what has to wait for its turn is given back."""
        if not block.is_only:
            return found
        self.add(block, found)
        return None

    def add(self, block: RowBlock, found: FactorGradients | None) -> None:
        """Add what one block of an expert's rows gives; an expert's blocks one after the other."""
        if found is None or self.A is None or self.B is None:
            return
        for target, part in ((self.A[block.expert], found[0]), (self.B[block.expert].t(), found[1])):
            if block.is_first:
                target.copy_(part)
            else:
                target.add_(part)
