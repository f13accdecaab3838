"""Products of a block's rows with their experts' weights, the low-rank update beside them.

Int8 weights are multiplied as they are where the machine has units for that, else through a cache-sized buffer, as
those of four bits are.

N rows of a block, S rows of all, E experts, O outputs, I inputs, R rank
a weight is stored as [O, I], or [I, O] transposed; in four bits as [I/2, O]
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch

from toolkit.ops import four_bit
from toolkit.ops.experts import ExpertStack
from toolkit.ops.factors import LoraFactors
from toolkit.ops.few_rows import can_read_once, read_once
from toolkit.ops.four_bit import FourBits
from toolkit.ops.rows import RowBlock, Segment, is_fake
from toolkit.ops.split_int8 import SplitRows, Stored, can_multiply, multiply_each

__all__ = ["FactorGradients", "Products", "StackGradients", "spread_out"]

FactorGradients = tuple[torch.Tensor, torch.Tensor]
"""Of one expert's A [R, I] and of its B, transposed: [R, O]."""

_BUFFER = 1 << 19
"""Elements of a weight multiplied out at a time on a CPU: about a core's own cache, and wide enough for BLAS."""
_FOUR_BIT_BUFFER = 1 << 20
"""The same of one in four bits, which takes many calls: larger than a core's cache is faster than more of them."""
_SMALL = 1 << 21
"""Elements of a stack that is multiplied out whole."""


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
        stack = spread_out(stack)
        if lora is None:
            return cls(stack, None, None, 1.0, None, is_known)
        return cls(stack, lora.A, lora.B.contiguous(), lora.scaling, low, is_known)

    @property
    def outputs(self) -> int:
        """O."""
        return self.stack.outputs

    @property
    def inputs(self) -> int:
        """I."""
        return self.stack.inputs

    def split_rows(self, x_TI: torch.Tensor) -> SplitRows | None:
        """Of all tokens at once, where products take digits: a token has several experts."""
        return SplitRows.of(x_TI) if self._takes_digits(x_TI) else None

    def forward(self, x_NI: torch.Tensor, block: RowBlock, split_rows: SplitRows | None = None) -> torch.Tensor:
        """x Wᵀ + b and the update: [N, O]. `split_rows`: of all tokens, where they are known."""
        factor = x_NI if split_rows is None else split_rows.gather(block.token)
        y_NO = self._product(factor, block, self.outputs, transposed=not self.stack.is_transposed)
        low_NR = None if self.A is None else self._low(x_NI.to(self.A.dtype), self.A, block)
        for segment in block.segments:
            expert, mine_NO = segment.expert, segment.of(y_NO)
            if self.stack.row_scale is not None:
                mine_NO.mul_(self.stack.row_scale[expert])
            if self.stack.bias is not None:
                mine_NO.add_(self.stack.bias[expert].to(y_NO.dtype))
            if low_NR is None or self.B is None:
                continue
            if low_NR.dtype == y_NO.dtype:
                mine_NO.addmm_(segment.of(low_NR), self.B[expert].t(), alpha=self.scaling)
            else:
                mine_NO.add_(torch.mm(segment.of(low_NR), self.B[expert].t()), alpha=self.scaling)
        return y_NO

    def backward(
        self,
        x_NI: torch.Tensor,
        grad_NO: torch.Tensor,
        block: RowBlock,
        weight_N1: torch.Tensor | None = None,
        *,
        needs_input: bool = True,
    ) -> tuple[torch.Tensor | None, list[FactorGradients]]:
        """Gradients of the input, grad W and the update's share [N, I], and of the factors, segment by segment.

        Args:
            weight_N1: what each row's gradient still has to be multiplied with. The factors' gradients take it in; the
                input's leaves it out.
            needs_input: whether the first is wanted.
        """
        grad_NI = self._input_product(grad_NO, block) if needs_input else None
        if self.A is None or self.B is None:
            return grad_NI, []
        low_NR = self._low(x_NI, self.A, block) * self.scaling
        grad_NR = torch.empty_like(low_NR)
        for segment in block.segments:
            torch.mm(segment.of(grad_NO), self.B[segment.expert], out=segment.of(grad_NR))
        grad_NR.mul_(self.scaling)
        if grad_NI is not None:
            for segment in block.segments:
                segment.of(grad_NI).addmm_(segment.of(grad_NR), self.A[segment.expert])
        if weight_N1 is not None:
            low_NR.mul_(weight_N1)
            grad_NR.mul_(weight_N1)
        # B's as [R, O]: BLAS is twice as fast at few rows as at few columns.
        parts = [[segment.of(each) for each in (grad_NR, x_NI, low_NR, grad_NO)] for segment in block.segments]
        return grad_NI, [(grad.t() @ x, low.t() @ grads) for grad, x, low, grads in parts]

    def bias_products(self, grad_NH: torch.Tensor, block: RowBlock) -> torch.Tensor | None:
        """⟨b, g⟩ of every row [N]; None where there is no bias."""
        if self.stack.bias is None:
            return None
        found = grad_NH.new_empty(grad_NH.shape[0])
        for segment in block.segments:
            found[segment.rows] = grad_NH[segment.rows] @ self.stack.bias[segment.expert].to(grad_NH.dtype)
        return found

    def gradients(self, idle: list[int]) -> StackGradients:
        """Of all experts' factors, to be filled for every expert but those in `idle`."""
        if self.A is None or self.B is None:
            return StackGradients(None, None)
        A, B = self.A.new_empty(self.A.shape), self.B.new_empty(self.B.shape)
        A[idle], B[idle] = 0, 0
        return StackGradients(A, B)

    def _low(self, x_NI: torch.Tensor, A_ERI: torch.Tensor, block: RowBlock) -> torch.Tensor:
        if self.low is not None and self.is_known:
            return block.pad(self.low[block.rows])
        low_NR = x_NI.new_empty(x_NI.shape[0], A_ERI.shape[1])
        for segment in block.segments:
            torch.mm(segment.of(x_NI), A_ERI[segment.expert].t(), out=segment.of(low_NR))
        if self.low is not None:
            self.low[block.rows] = block.strip(low_NR)
        return low_NR

    def _input_product(self, grad_NO: torch.Tensor, block: RowBlock) -> torch.Tensor:
        scaled = grad_NO
        if self.stack.row_scale is not None:
            scaled = torch.empty_like(grad_NO)
            for segment in block.segments:
                torch.mul(segment.of(grad_NO), self.stack.row_scale[segment.expert], out=segment.of(scaled))
        return self._product(scaled, block, self.inputs, transposed=self.stack.is_transposed)

    def _product(self, x: torch.Tensor | SplitRows, block: RowBlock, width: int, *, transposed: bool) -> torch.Tensor:
        """x times its experts' stored weights [P, Q], or times their transposes, scale left out: [N, width]."""
        if isinstance(x, SplitRows) or self._takes_digits(x):
            parts = [(segment.rows, self._whole_numbers(segment.expert)) for segment in block.segments]
            return multiply_each(x, parts, width, transposed=transposed)
        result = x.new_empty(x.shape[0], width)
        for segment in block.segments:
            mine, out = segment.of(x), segment.of(result)
            if transposed and can_read_once(mine, self.stack.weight):
                out.copy_(read_once(mine, self.stack.weight[segment.expert]))
                continue
            if self.stack.four_bits and not transposed:
                for outputs, weight in self._by_outputs(segment.expert, x.dtype):
                    torch.mm(mine, weight, out=out[:, outputs])
                continue
            for rows, weight in self._parts(segment.expert, x.dtype):
                if transposed:
                    torch.mm(mine, weight.t(), out=out[:, rows])
                elif rows.start == 0:
                    torch.mm(mine[:, rows], weight, out=out)
                else:
                    out.addmm_(mine[:, rows], weight)
        return result

    def _takes_digits(self, x: torch.Tensor) -> bool:
        if self.stack.four_bits == "int4":
            return can_multiply(x, self.stack.weight.view(torch.int8), (self.inputs, self.outputs))
        return can_multiply(x, self.stack.weight)

    def _whole_numbers(self, expert: int) -> Stored:
        """An expert's weight in int8 as it is stored, or what unpacks it, in the place of the last."""
        if not self.stack.four_bits:
            return self.stack.weight[expert]
        stored, shape = self.stack.packed(expert), (self.inputs, self.outputs)
        return lambda: four_bit.integers(stored, out=_buffer(prod(shape), torch.int8, stored.packed.device).view(shape))

    def _parts(self, expert: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of an expert's stored weight in the compute dtype, each part in the place of the last."""
        if self.stack.four_bits:
            yield from self._unpacked(expert, dtype)
            return
        weight = self.stack.weight[expert]
        if weight.dtype == dtype:
            yield slice(0, weight.shape[0]), weight
            return
        step = max(1, _BUFFER // weight.shape[1]) if weight.device.type == "cpu" else weight.shape[0]
        elements, reuses = min(step, weight.shape[0]) * weight.shape[1], not is_fake(weight)
        buffer = _buffer(elements, dtype, weight.device) if reuses else weight.new_empty(elements, dtype=dtype)
        for start in range(0, weight.shape[0], step):
            rows = slice(start, min(start + step, weight.shape[0]))
            part = weight[rows]
            yield rows, buffer[: part.numel()].view(part.shape).copy_(part)

    def _by_outputs(self, expert: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Outputs of a weight of four bits [I, O] in the compute dtype, all inputs of them: nothing has to be added."""
        stored, inputs = self.stack.packed(expert), self.inputs
        step = max(1, _FOUR_BIT_BUFFER // inputs) if stored.packed.device.type == "cpu" else self.outputs
        for start in range(0, self.outputs, step):
            outputs = slice(start, min(start + step, self.outputs))
            part = four_bit.outputs_of(stored, outputs)
            whole = self._room(part.packed, inputs * part.packed.shape[-1], dtype).view(inputs, -1)
            low, high = whole.chunk(2)
            four_bit.rows_into(low, high, part, 0, inputs // 2)
            yield outputs, whole

    def _unpacked(self, expert: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of it: each run of bytes is a run of rows in either half."""
        stored = self.stack.packed(expert)
        half, width = stored.packed.shape
        group = four_bit.group_of(stored)
        many = max(1, _FOUR_BIT_BUFFER // (2 * width * group)) * group if stored.packed.device.type == "cpu" else half
        for start in range(0, half, many):
            stop = min(start + many, half)
            low, high = self._room(stored.packed, 2 * (stop - start) * width, dtype).view(2, stop - start, width)
            four_bit.rows_into(low, high, stored, start, stop)
            yield slice(start, stop), low
            yield slice(half + start, half + stop), high

    def _room(self, like: torch.Tensor, elements: int, dtype: torch.dtype) -> torch.Tensor:
        if is_fake(like):
            return like.new_empty(elements, dtype=dtype)
        return _buffer(elements, dtype, like.device)


def spread_out(stack: ExpertStack) -> ExpertStack:
    """A small stack of four bits as one of int8 or fp32: expert by expert, unpacking would be calls and no work."""
    if not stack.four_bits or stack.scale is None or 2 * stack.weight.numel() > _SMALL or is_fake(stack.weight):
        return stack
    packed = FourBits(stack.weight, stack.scale, stack.step)
    if stack.step is not None:
        return replace(stack, weight=four_bit.integers(packed), step=None)
    return replace(stack, weight=four_bit.dequantize(packed).transpose(-1, -2), scale=None)


_kept = threading.local()


def _buffer(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Room that is overwritten by the thread's next call. On a CPU the same memory, warm, every time."""
    if device.type != "cpu":
        return torch.empty(elements, dtype=dtype, device=device)
    buffer: torch.Tensor | None = getattr(_kept, str(dtype), None)
    if buffer is None or buffer.numel() < elements:
        with torch.inference_mode(False):
            buffer = torch.empty(elements, dtype=dtype)
        setattr(_kept, str(dtype), buffer)
    return buffer[:elements]


@dataclass(frozen=True)
class StackGradients:
    """Gradients of all experts' factors, A [E, R, I] and B [E, O, R]; none where the projection is not adapted."""

    A: torch.Tensor | None
    B: torch.Tensor | None

    def take(self, block: RowBlock, found: list[FactorGradients]) -> list[FactorGradients | None]:
        """Write at once what nothing else is added to; what has to wait for its turn is given back."""
        waiting: list[FactorGradients | None] = []
        for segment, gradients in zip(block.segments, found, strict=False):
            waiting.append(None if segment.is_only else gradients)
            if segment.is_only:
                self._add(segment, gradients)
        return waiting

    def add(self, block: RowBlock, waiting: list[FactorGradients | None]) -> None:
        """Add what one block of rows gives; an expert's blocks one after the other."""
        for segment, gradients in zip(block.segments, waiting, strict=False):
            if gradients is not None:
                self._add(segment, gradients)

    def _add(self, segment: Segment, gradients: FactorGradients) -> None:
        assert self.A is not None
        assert self.B is not None
        for target, part in zip((self.A[segment.expert], self.B[segment.expert].t()), gradients, strict=True):
            if segment.is_first:
                target.copy_(part)
            else:
                target.add_(part)
