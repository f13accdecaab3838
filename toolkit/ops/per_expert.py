"""The expert layer as one autograd function: only the experts that are hit cost anything.

Rows are visited expert by expert. Each hit expert's int8 weights are copied into one reused buffer, their scale is
folded into the product, and the LoRA update is added as `(x Aᵀ) Bᵀ`, so no dense delta exists. Only the input, the
routing and the factors are kept for backward, which recomputes the rest. Runs on any device; PEFT's own expert layer
instead rebuilds `W + BA` for all experts in every forward and cannot run on int8.

    T tokens, K experts per token, N rows of one expert (padded), E experts, H hidden, O outputs, I inputs, R rank
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.ops.factors import LoraFactors
from toolkit.quant import ExpertStack, ExpertWeights

__all__ = ["expert_layer"]

_FEWEST_ROWS = 16
"""BLAS picks other kernels for a few rows, and then a row's bits depend on how many neighbours it has. Padding to this
many makes a token's output the same, bit for bit, whatever else is in the batch."""


def expert_layer(
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    weights: ExpertWeights,
    up_lora: LoraFactors | None = None,
    down_lora: LoraFactors | None = None,
) -> torch.Tensor:
    """The weighted sum of every token's experts: [T, H], in x's dtype. As `reference.expert_layer`."""
    factors = [None if lora is None else f.to(x_TH.dtype) for lora in (up_lora, down_lora) for f in _pair(lora)]
    output: torch.Tensor = _ExpertLayer.apply(x_TH, weight_TK, *factors, index_TK, weights)
    return output


def _pair(lora: LoraFactors | None) -> tuple[Any, Any]:
    return (None, None) if lora is None else (lora.A, lora.B)


@dataclass
class _Projection:
    """One stack at work: its buffer, its factors, and (in backward) their gradients."""

    stack: ExpertStack
    A: torch.Tensor | None
    B: torch.Tensor | None
    buffer: torch.Tensor | None
    grad_A: torch.Tensor | None = None
    grad_B: torch.Tensor | None = None

    @classmethod
    def of(cls, stack: ExpertStack, A: torch.Tensor | None, B: torch.Tensor | None, dtype: torch.dtype) -> _Projection:
        return cls(stack, A, B, stack.buffer(dtype))

    def allocate_gradients(self) -> None:
        if self.A is not None and self.B is not None:
            self.grad_A, self.grad_B = torch.zeros_like(self.A), torch.zeros_like(self.B)

    def forward(self, x_NI: torch.Tensor, expert: int) -> torch.Tensor:
        y_NO = x_NI @ self._weight(expert, x_NI.dtype).t()
        if self.stack.scale is not None:
            y_NO.mul_(self.stack.scale[expert].to(y_NO.dtype))
        if self.stack.bias is not None:
            y_NO.add_(self.stack.bias[expert].to(y_NO.dtype))
        if self.A is not None and self.B is not None:
            y_NO.addmm_(x_NI @ self.A[expert].t(), self.B[expert].t())
        return y_NO

    def backward(self, x_NI: torch.Tensor, grad_NO: torch.Tensor, expert: int) -> torch.Tensor:
        scaled = grad_NO if self.stack.scale is None else grad_NO * self.stack.scale[expert].to(grad_NO.dtype)
        grad_NI = scaled @ self._weight(expert, grad_NO.dtype)
        if self.A is not None and self.B is not None and self.grad_A is not None and self.grad_B is not None:
            grad_NR = grad_NO @ self.B[expert]
            torch.mm(grad_NR.t(), x_NI, out=self.grad_A[expert])
            torch.mm(grad_NO.t(), x_NI @ self.A[expert].t(), out=self.grad_B[expert])
            grad_NI.addmm_(grad_NR, self.A[expert])
        return grad_NI

    def _weight(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.stack.integer(expert, self.buffer).to(dtype)


class _ExpertLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x_TH, weight_TK, up_A, up_B, down_A, down_B, index_TK, weights = args
        ctx.save_for_backward(x_TH, weight_TK, up_A, up_B, down_A, down_B, index_TK)
        ctx.weights = weights
        up = _Projection.of(weights.up, up_A, up_B, x_TH.dtype)
        down = _Projection.of(weights.down, down_A, down_B, x_TH.dtype)
        out_TH = torch.zeros_like(x_TH)
        for rows in _hit_experts(index_TK, weights.up.weight.shape[0]):
            y_NH = down.forward(weights.gate(up.forward(rows.gather(x_TH), rows.expert)), rows.expert)
            if weights.post_norm is not None:
                y_NH = weights.post_norm(y_NH)
            rows.scatter_add(out_TH, y_NH * rows.weights(weight_TK, x_TH.dtype))
        return out_TH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, weight_TK, up_A, up_B, down_A, down_B, index_TK = ctx.saved_tensors
        weights: ExpertWeights = ctx.weights
        grad_out_TH = grads[0].contiguous()
        up = _Projection.of(weights.up, up_A, up_B, x_TH.dtype)
        down = _Projection.of(weights.down, down_A, down_B, x_TH.dtype)
        up.allocate_gradients()
        down.allocate_gradients()
        grad_x_TH, grad_weight_TK = torch.zeros_like(x_TH), torch.zeros_like(weight_TK)
        for rows in _hit_experts(index_TK, weights.up.weight.shape[0]):
            x_NH, grad_NH = rows.gather(x_TH), rows.gather(grad_out_TH)
            y_NO = up.forward(x_NH, rows.expert)
            with torch.enable_grad():
                leaf = y_NO.requires_grad_()
                hidden_NI = weights.gate(leaf)
            grad_hidden_NI, grad_rows = _down_backward(weights, down, hidden_NI.detach(), grad_NH, rows, weight_TK)
            rows.write(grad_weight_TK, grad_rows)
            (grad_y_NO,) = torch.autograd.grad(hidden_NI, leaf, grad_hidden_NI)
            rows.scatter_add(grad_x_TH, up.backward(x_NH, grad_y_NO, rows.expert))
        return grad_x_TH, grad_weight_TK, up.grad_A, up.grad_B, down.grad_A, down.grad_B, None, None


def _down_backward(
    weights: ExpertWeights,
    down: _Projection,
    hidden_NI: torch.Tensor,
    grad_NH: torch.Tensor,
    rows: _Rows,
    weight_TK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the second projection's input [N, I] and of the routing weights [N]."""
    weight_N1 = rows.weights(weight_TK, hidden_NI.dtype)
    if weights.post_norm is not None:
        with torch.enable_grad():
            leaf = down.forward(hidden_NI, rows.expert).requires_grad_()
            normed_NH = weights.post_norm(leaf)
        grad_rows = (normed_NH.detach() * grad_NH).sum(-1)
        (grad_y_NH,) = torch.autograd.grad(normed_NH, leaf, grad_NH * weight_N1)
        return down.backward(hidden_NI, grad_y_NH, rows.expert), grad_rows
    # y = w·(h Wᵀ + b): with g the gradient of the row's sum, ∂w = ⟨h, g W⟩ + ⟨b, g⟩, so y itself is not needed.
    # The factors' gradients are linear in g as well, so they take w through h.
    unweighted_NI = down.backward(hidden_NI * weight_N1, grad_NH, rows.expert)
    grad_rows = (hidden_NI * unweighted_NI).sum(-1)
    if down.stack.bias is not None:
        grad_rows = grad_rows + grad_NH @ down.stack.bias[rows.expert].to(grad_NH.dtype)
    return unweighted_NI * weight_N1, grad_rows


@dataclass(frozen=True)
class _Rows:
    """The rows routed to one expert: which token and which of its K slots each comes from, [N] both."""

    expert: int
    token: torch.Tensor
    slot: torch.Tensor

    def gather(self, source_TH: torch.Tensor) -> torch.Tensor:
        """[N, H], zero rows below the real ones where there are few."""
        count = self.token.shape[0]
        rows = source_TH.index_select(0, self.token)
        if count >= _FEWEST_ROWS:
            return rows
        return torch.cat([rows, rows.new_zeros(_FEWEST_ROWS - count, rows.shape[1])])

    def weights(self, weight_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Routing weights as a column [N, 1], zero for the padding."""
        column = weight_TK[self.token, self.slot].to(dtype)
        short = max(0, _FEWEST_ROWS - column.shape[0])
        return torch.nn.functional.pad(column, (0, short)).unsqueeze(1)

    def scatter_add(self, target_TH: torch.Tensor, rows_NH: torch.Tensor) -> None:
        """Add the real rows to their tokens."""
        target_TH.index_add_(0, self.token, rows_NH[: self.token.shape[0]].to(target_TH.dtype))

    def write(self, target_TK: torch.Tensor, values_N: torch.Tensor) -> None:
        """Set each row's own slot."""
        target_TK[self.token, self.slot] = values_N[: self.token.shape[0]].to(target_TK.dtype)


def _hit_experts(index_TK: torch.Tensor, num_experts: int) -> Iterator[_Rows]:
    """Rows grouped by expert, in expert order, tokens ascending in each; experts nobody chose are left out."""
    flat = index_TK.flatten()
    order = flat.argsort(stable=True)
    top_k = index_TK.shape[1]
    start = 0
    for expert, count in enumerate(torch.bincount(flat, minlength=num_experts)[:num_experts].tolist()):
        if count:
            rows = order[start : start + count]
            yield _Rows(expert, rows // top_k, rows % top_k)
            start += count
