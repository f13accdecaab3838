"""The expert layer as one autograd function over the kernels, for CUDA cards. `ops/reference.py` is the law.

Kept for backward are the input, the routing and the factors; the first projection is computed again there, in memory
that the gate's backward overwrites. No row-sorted copy of the input exists: kernels read its rows through an index.
Checked in Triton's interpreter and by its compiler; never yet run on a card (`scripts/gpu_check.py` is for that day).

    T tokens, K experts per token, S = T·K rows sorted by expert, E experts, H hidden, I intermediate, O outputs, R rank
"""

# torch types a custom operator's result as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from toolkit.errors import ModelError
from toolkit.ops.factors import LoraFactors
from toolkit.ops.presence import present
from toolkit.ops.rows import is_fake
from toolkit.ops.triton import products
from toolkit.ops.triton.gates import GateForm, recognize
from toolkit.ops.triton.routing import SortedRows, route
from toolkit.ops.triton.tiles import INTERPRETED

__all__ = ["Stack", "Weights", "expert_layer", "expert_layer_w8a8"]


class Stack(Protocol):
    """What is read of one projection: `toolkit.quant.ExpertStack` has it."""

    @property
    def weight(self) -> torch.Tensor:
        """[E, O, I], or [E, I, O] when transposed; of four bits [E, I/2, O] bytes, transposed."""

    @property
    def scale(self) -> torch.Tensor | None:
        """fp32 [E, O] where the weight is int8 or int4; of others in four bits [E, I/G, O]."""

    @property
    def step(self) -> torch.Tensor | None:
        """int8 [E, I/G, O] where the weight is int4."""

    @property
    def bias(self) -> torch.Tensor | None:
        """[E, O]."""

    @property
    def is_transposed(self) -> bool:
        """Whether the weight lies [E, I, O]."""


class Weights(Protocol):
    """What is read of an expert layer: `toolkit.quant.ExpertWeights` has it."""

    @property
    def up(self) -> Stack:
        """First projection."""

    @property
    def down(self) -> Stack:
        """Second projection."""

    @property
    def gate(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """[S, O] to [S, I]."""

    @property
    def post_norm(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """[S, H] to [S, H], row by row."""


def expert_layer(
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    weights: Weights,
    up_lora: LoraFactors | None = None,
    down_lora: LoraFactors | None = None,
    *,
    keep_up: bool = False,
) -> torch.Tensor:
    """The weighted sum of every token's experts: [T, H], in x's dtype: fp32, bf16 or fp16.

    `keep_up` keeps the first projection's output [S, O] for backward, which is then not computed again.

    Raises:
        ModelError: fp64, or a device that is no CUDA card outside Triton's interpreter.
    """
    return _apply(x_TH, index_TK, weight_TK, weights, (up_lora, down_lora), keep_up, is_int8=False)


def expert_layer_w8a8(
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    weights: Weights,
    up_lora: LoraFactors | None = None,
    down_lora: LoraFactors | None = None,
    *,
    keep_up: bool = False,
) -> torch.Tensor:
    """The same with the frozen products of forward on int8 tensor cores: rows are split into two int8 digits.

    Sixteen bits beside a row's largest number, where bf16 has eight beside each; see `w8a8.py` for the comparison of
    losses that decides all the same. Backward computes as usual. Stacks that are no whole numbers stay as they are.
    """
    return _apply(x_TH, index_TK, weight_TK, weights, (up_lora, down_lora), keep_up, is_int8=True)


def _apply(
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    weights: Weights,
    loras: tuple[LoraFactors | None, LoraFactors | None],
    keep_up: bool,
    is_int8: bool,
) -> torch.Tensor:
    if x_TH.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"the Triton experts compute in fp32, bf16 or fp16, not {x_TH.dtype}; use onecard_per_expert")
    if x_TH.device.type != "cuda" and not INTERPRETED and not is_fake(x_TH):
        raise ModelError(f"the Triton experts need a CUDA card, not {x_TH.device.type}; use onecard_per_expert")
    form = recognize(weights.gate, _outputs(weights.up), x_TH.device)
    factors = [factor for lora in loras for factor in ((None, None) if lora is None else (lora.A, lora.B))]
    scalings = tuple(1.0 if lora is None else lora.scaling for lora in loras)
    output: torch.Tensor = _ExpertLayer.apply(
        x_TH, weight_TK, *factors, index_TK, weights, form, scalings, keep_up, is_int8
    )
    return output


def _outputs(stack: Stack) -> int:
    return stack.weight.shape[2 if stack.is_transposed else 1]


@dataclass
class _Projection:
    """One stack with its factors, over the rows of one routing. A [E, R, I], B [E, O, R]."""

    stack: Stack
    A: torch.Tensor | None
    B: torch.Tensor | None
    scaling: float
    offset: torch.Tensor
    is_int8: bool

    def low(self, x: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor | None:
        """x Aᵀ: [S, R]."""
        if self.A is None:
            return None
        return products.grouped_gemm(x, self.A.to(x.dtype), self.offset, row, x.dtype)

    def low_gradient(self, grad: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor | None:
        """grad · scaling B: [S, R]."""
        B = self._scaled_B(grad.dtype)
        return None if B is None else products.grouped_gemm(grad, B, self.offset, row, grad.dtype, is_swapped=True)

    def _scaled_B(self, dtype: torch.dtype) -> torch.Tensor | None:
        if self.B is None:
            return None
        return torch.mul(self.B.detach(), self.scaling, out=self.B.new_empty(self.B.shape, dtype=dtype))

    def forward(self, x: torch.Tensor, row: torch.Tensor | None, low: torch.Tensor | None) -> torch.Tensor:
        """x Wᵀ + b + low · scaling Bᵀ: [S, O]; x [S, I], or gathered by `row`."""
        stack, unit, dtype = self.stack, None, x.dtype
        if self.is_int8 and stack.scale is not None and (stack.weight.dtype == torch.int8 or stack.step is not None):
            x, unit = products.split_rows(x)
        return products.grouped_gemm(
            x, stack.weight, self.offset, row, dtype, is_swapped=stack.is_transposed, scale=stack.scale,
            bias=stack.bias, x_unit=unit, low=low, factor=self._scaled_B(dtype), step=stack.step,
        )  # fmt: skip

    def input_gradient(
        self, grad: torch.Tensor, row: torch.Tensor | None, low_gradient: torch.Tensor | None
    ) -> torch.Tensor:
        """grad W + low_gradient A: [S, I]; grad [S, O], or gathered by `row`."""
        stack = self.stack
        return products.grouped_gemm(
            grad, stack.weight, self.offset, row, grad.dtype, is_swapped=not stack.is_transposed, scale=stack.scale,
            is_scale_on_input=True, low=low_gradient,
            factor=None if self.A is None else self.A.to(grad.dtype), is_factor_swapped=True, step=stack.step,
        )  # fmt: skip


class _ExpertLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        index_TK, weights = args[6:8]
        with present(weights, index_TK, trains=any(ctx.needs_input_grad)) as there:
            return _ExpertLayer._compute(ctx, there, *args)

    @staticmethod
    def _compute(ctx: Any, there: Weights, *args: Any) -> torch.Tensor:
        x_TH, weight_TK, up_A, up_B, down_A, down_B, index_TK, weights, form, scalings, keep_up, is_int8 = args
        routing = route(index_TK, weights.up.weight.shape[0])
        # Not among the saved tensors: a stack may be streamed in again before backward, and hooks must not copy it.
        ctx.weights, ctx.form, ctx.scalings, ctx.is_int8 = weights, form, scalings, is_int8
        # torch calls backward in a thread of its own, which knows nothing of the progress that is shown.
        ctx.context = None if torch.compiler.is_compiling() else copy_context()
        up = _Projection(there.up, up_A, up_B, scalings[0], routing.offset, is_int8)
        down = _Projection(there.down, down_A, down_B, scalings[1], routing.offset, is_int8)
        y_SO = up.forward(x_TH, routing.token, up.low(x_TH, routing.token))
        ctx.save_for_backward(
            x_TH, weight_TK, up_A, up_B, down_A, down_B, y_SO if keep_up else None,
            index_TK, routing.token, routing.slot, routing.place, routing.offset,
        )  # fmt: skip
        hidden_SI = weights.gate(y_SO) if form is None else products.gate_forward(form, y_SO)
        del y_SO
        rows_SH = down.forward(hidden_SI, None, down.low(hidden_SI, None))
        if weights.post_norm is not None:
            rows_SH = weights.post_norm(rows_SH)
        return products.gather_sum(rows_SH, routing.place, weight_TK)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # once only: under gradient checkpointing this is what computes the layer again

        def gradients() -> tuple[torch.Tensor | None, ...]:
            with present(ctx.weights, saved[7], trains=True) as there:
                return _ExpertLayer._gradients(ctx, there, grads[0], *saved)

        return gradients() if ctx.context is None else ctx.context.run(gradients)

    @staticmethod
    def _gradients(ctx: Any, weights: Weights, grad_TH: torch.Tensor, *saved: Any) -> tuple[torch.Tensor | None, ...]:
        x_TH, weight_TK, up_A, up_B, down_A, down_B, kept_SO, index_TK, *routing = saved
        rows = SortedRows(*routing)
        up = _Projection(weights.up, up_A, up_B, ctx.scalings[0], rows.offset, ctx.is_int8)
        down = _Projection(weights.down, down_A, down_B, ctx.scalings[1], rows.offset, ctx.is_int8)
        low_up_SR = up.low(x_TH, rows.token)
        # A kept one is copied: the gate's backward writes into it, and somebody may want this backward twice.
        y_SO = up.forward(x_TH, rows.token, low_up_SR) if kept_SO is None else kept_SO.clone()
        state = _Down(weights, down, rows, weight_TK.reshape(-1)[rows.slot], index_TK, grad_TH.contiguous())
        grad_y_SO, grad_weight_TK, grad_down_A, grad_down_B = state.backward(y_SO, ctx.form)
        del y_SO
        low_SR = up.low_gradient(grad_y_SO, None)
        grad_up_A, grad_up_B = _factor_gradients(
            up, (x_TH, rows.token), (grad_y_SO, None), low_up_SR, low_SR, rows.offset
        )
        grad_x_TH = None
        if ctx.needs_input_grad[0]:
            grad_x_TH = products.gather_sum(up.input_gradient(grad_y_SO, None, low_SR), rows.place, None)
        factors = (grad_up_A, grad_up_B, grad_down_A, grad_down_B)
        return grad_x_TH, grad_weight_TK.to(weight_TK.dtype), *factors, *(None,) * 6


@dataclass
class _Down:
    """Backward of second projection, gate and routing weights. weight_S: each sorted row's routing weight."""

    weights: Weights
    projection: _Projection
    rows: SortedRows
    weight_S: torch.Tensor
    index_TK: torch.Tensor
    grad_TH: torch.Tensor

    def backward(
        self, y_SO: torch.Tensor, form: GateForm | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of y [S, O] (in y's memory where the gate is known), of the routing weights [T, K], of A and B."""
        if self.weights.post_norm is not None:
            return self._through_norm(y_SO, form)
        # y = w·(h Wᵀ + b): with g the gradient of the token's sum, ∂w = ⟨h, g W⟩ + ⟨b, g⟩, so y itself is not needed.
        # The factors' gradients are linear in g as well, so they take w through h.
        down, grad = self.projection, (self.grad_TH, self.rows.token)
        low_gradient_SR = down.low_gradient(*grad)
        grad_hidden_SI = down.input_gradient(*grad, low_gradient_SR)
        dot_S, grad_y_SO, weighted_SI = _gate_gradients(self.weights.gate, form, y_SO, grad_hidden_SI, self.weight_S)
        low_SR = down.low(weighted_SI, None)
        factors = _factor_gradients(down, (weighted_SI, None), grad, low_SR, low_gradient_SR, self.rows.offset)
        return grad_y_SO, self._routing_gradient(dot_S), *factors

    def _through_norm(
        self, y_SO: torch.Tensor, form: GateForm | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        down, post_norm = self.projection, self.weights.post_norm
        assert post_norm is not None
        hidden_SI = self.weights.gate(y_SO) if form is None else products.gate_forward(form, y_SO)
        low_SR = down.low(hidden_SI, None)
        with torch.enable_grad():
            leaf_SH = down.forward(hidden_SI, None, low_SR).detach().requires_grad_()
            normed_SH = post_norm(leaf_SH)
        grad_SH = self.grad_TH[self.rows.token.long()]
        dot_S = (normed_SH.detach().float() * grad_SH.float()).sum(-1)
        weighted_SH = (grad_SH * self.weight_S.unsqueeze(1)).to(normed_SH.dtype)
        (grad_SH,) = torch.autograd.grad(normed_SH, leaf_SH, weighted_SH)
        low_gradient_SR = down.low_gradient(grad_SH, None)
        factors = _factor_gradients(down, (hidden_SI, None), (grad_SH, None), low_SR, low_gradient_SR, self.rows.offset)
        grad_hidden_SI = down.input_gradient(grad_SH, None, low_gradient_SR)
        ones_S = torch.ones_like(self.weight_S)
        _, grad_y_SO, _ = _gate_gradients(self.weights.gate, form, y_SO, grad_hidden_SI, ones_S)
        return grad_y_SO, self._unsorted(dot_S), *factors

    def _routing_gradient(self, dot_S: torch.Tensor) -> torch.Tensor:
        grad_TK, bias_EH = self._unsorted(dot_S), self.projection.stack.bias
        if bias_EH is None:
            return grad_TK
        dots_TE = (self.grad_TH @ bias_EH.to(self.grad_TH.dtype).t()).float()
        return torch.where(self.rows.place >= 0, grad_TK + dots_TE.gather(1, self._experts), 0.0)

    @property
    def _experts(self) -> torch.Tensor:
        return self.index_TK.clamp(max=self.projection.stack.weight.shape[0] - 1)

    def _unsorted(self, dot_S: torch.Tensor) -> torch.Tensor:
        """[T, K] from sorted rows; slots of nobody's expert get zero."""
        return torch.where(self.rows.place >= 0, dot_S[self.rows.place.clamp(min=0).long()], 0.0)


def _gate_gradients(
    gate: Callable[[torch.Tensor], torch.Tensor],
    form: GateForm | None,
    y_SO: torch.Tensor,
    grad_SI: torch.Tensor,
    weight_S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """⟨gate(y), grad⟩ [S], w·∂y [S, O] and w·gate(y) [S, I]; a gate of no known form goes through autograd."""
    if form is not None:
        return products.gate_backward(form, y_SO, grad_SI, weight_S), y_SO, grad_SI
    with torch.enable_grad():
        leaf_SO = y_SO.detach().requires_grad_()
        hidden_SI = gate(leaf_SO)
    weight_S1 = weight_S.unsqueeze(1)
    (grad_y_SO,) = torch.autograd.grad(hidden_SI, leaf_SO, (grad_SI * weight_S1).to(hidden_SI.dtype))
    dot_S = (hidden_SI.detach().float() * grad_SI.float()).sum(-1)
    return dot_S, grad_y_SO, (hidden_SI.detach() * weight_S1).to(grad_SI.dtype)


def _factor_gradients(
    projection: _Projection,
    x: tuple[torch.Tensor, torch.Tensor | None],
    grad: tuple[torch.Tensor, torch.Tensor | None],
    low_SR: torch.Tensor | None,
    low_gradient_SR: torch.Tensor | None,
    offset: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """∂A = (grad · scaling B)ᵀ x [E, R, I] and ∂B = scaling · gradᵀ (x Aᵀ) [E, O, R], in the factors' dtypes."""
    A, B = projection.A, projection.B
    if A is None or B is None or low_SR is None or low_gradient_SR is None:
        return None, None
    grad_A = products.grouped_gram(low_gradient_SR, None, *x, offset)
    grad_B = products.grouped_gram(*grad, low_SR, None, offset).mul_(projection.scaling)
    return grad_A.to(A.dtype), grad_B.to(B.dtype)
