"""The expert layer as one autograd function: only the experts that are hit cost anything.

Hit experts are computed side by side, one a core. Their int8 weights are copied, a cache's worth at a time, into one
reused buffer; the scale is folded into the product and the LoRA update is added as `(x Aᵀ) Bᵀ`, so no dense delta and
no sorted copy of the input exists. Runs on any device; PEFT's own expert layer instead rebuilds `W + BA` for all
experts in every forward and cannot run on int8.

    T tokens, K experts per token, N rows of one expert (padded), S rows of all, E experts
    H hidden, O outputs, I inputs, R rank
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from toolkit.ops.equal_rows import EqualRouting
from toolkit.ops.experts import ExpertStack, ExpertWeights
from toolkit.ops.factors import LoraFactors
from toolkit.ops.few_rows import is_better_in_fp32
from toolkit.ops.presence import present
from toolkit.ops.rows import Routing, RowBlock, is_fake
from toolkit.ops.small_experts import SmallGradients, SmallProducts, experts_at_a_time
from toolkit.ops.stack import FactorGradients, Products, StackGradients
from toolkit.ops.workers import run_in_order

__all__ = ["expert_layer", "kept_rows"]

_KEPT_OF_WEIGHTS = 0.3
"""Share of the weights' bytes: what is kept grows with the tokens, and is to stay small beside the layer."""
_KEPT_OF_SMALL = 1 << 22
"""Bytes of a layer of small experts, checkpointed or not: too little to count, and a sixth of the arithmetic."""
_FEW_ROWS = 256
"""Rows of all experts up to which nothing is shared among threads but each product."""
_MOST_ROWS = 512
"""Rows computed at a time: enough for a full-speed product, and one hot expert is still shared among the cores."""


def expert_layer(
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    weights: ExpertWeights,
    up_lora: LoraFactors | None = None,
    down_lora: LoraFactors | None = None,
    *,
    keep_up: bool = False,
) -> torch.Tensor:
    """The weighted sum of every token's experts: [T, H], in x's dtype. As `reference.expert_layer`.

    Backward needs the first projection's output [S, O] again. It computes it again, which adds a third to the layer's
    arithmetic, or reads what `keep_up` kept, see `kept_rows`. Under gradient checkpointing keeping is nearly free: one
    layer's is alive at a time, and computing it again would be the third time.
    """
    pairs = [(None, None, 1.0) if lora is None else (lora.A, lora.B, lora.scaling) for lora in (up_lora, down_lora)]
    factors = [None if each is None else _as(x_TH, each) for A, B, _ in pairs for each in (A, B)]
    scalings = tuple(scaling for *_, scaling in pairs)
    given = (x_TH, weight_TK, *factors, index_TK, weights, scalings)
    if not torch.is_grad_enabled():
        with present(weights, index_TK, trains=False) as there:
            return _without_gradients(there, *given)
    output: torch.Tensor = _ExpertLayer.apply(*given, keep_up)
    return output


def _as(x_TH: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return factor if is_better_in_fp32(x_TH, factor) else factor.to(x_TH.dtype)


def _without_gradients(there: ExpertWeights, *given: Any) -> torch.Tensor:
    """Nothing is kept. Few rows are one block, whose products take all threads: sharing them out takes longer."""
    x_TH, weight_TK, up_A, up_B, down_A, down_B, index_TK, weights, scalings = given
    are_few = index_TK.device.type == "cpu" and index_TK.numel() <= _FEW_ROWS and not is_fake(index_TK)
    routing = _routing(index_TK, x_TH.dtype, there, are_few=are_few)
    up = _products(there.up, _factors(up_A, up_B, scalings[0]), routing)
    down = _products(there.down, _factors(down_A, down_B, scalings[1]), routing)
    return _forward(routing, x_TH, weight_TK, up, down, weights)


def _forward(
    routing: Routing,
    x_TH: torch.Tensor,
    weight_TK: torch.Tensor,
    up: Products | SmallProducts,
    down: Products | SmallProducts,
    weights: ExpertWeights,
    kept_SO: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer's output [T, H]; the first projection's goes to `kept_SO`, as far as that reaches."""
    out_TH = torch.zeros_like(x_TH)
    weight_S1 = routing.sort(weight_TK).to(x_TH.dtype).unsqueeze(1)
    split_rows = up.split_rows(x_TH)

    def compute(block: RowBlock) -> torch.Tensor:
        y_NO = up.forward(block.gather(x_TH), block, split_rows)
        if kept_SO is not None and block.is_within(kept_SO):
            kept_SO[block.rows] = block.strip(y_NO)
        y_NH = down.forward(weights.gate(y_NO), block)
        if weights.post_norm is not None:
            y_NH = weights.post_norm(y_NH)
        return y_NH.mul_(block.pad(weight_S1[block.rows]))

    _run(routing, compute, lambda block, y_NH: block.scatter_add(out_TH, y_NH), x_TH.device)
    return out_TH


class _ExpertLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        *_, index_TK, weights, _, _ = args
        with present(weights, index_TK, trains=any(ctx.needs_input_grad)) as there:
            return _ExpertLayer._compute(ctx, there, *args)

    @staticmethod
    def _compute(ctx: Any, there: ExpertWeights, *args: Any) -> torch.Tensor:
        x_TH, weight_TK, up_A, up_B, down_A, down_B, index_TK, weights, scalings, keep_up = args
        rows, trains, routing = index_TK.numel(), any(ctx.needs_input_grad), _routing(index_TK, x_TH.dtype, there)
        are_small = isinstance(routing, EqualRouting)
        lows = [
            x_TH.new_empty(rows, A.shape[1]) if trains and not are_small and A is not None else None
            for A in (up_A, down_A)
        ]
        up = _products(there.up, _factors(up_A, up_B, scalings[0]), routing, lows[0])
        down = _products(there.down, _factors(down_A, down_B, scalings[1]), routing, lows[1])
        kept = kept_rows(rows, up.outputs, weights, x_TH.dtype) if keep_up else 0
        if are_small:
            kept = max(kept, min(rows, _KEPT_OF_SMALL // (up.outputs * x_TH.element_size())))
        kept_SO = x_TH.new_empty(kept, up.outputs) if trains and kept else None
        if keep_up and isinstance(up, Products) and isinstance(down, Products):
            up_B, down_B = up.B, down.B  # then the factors in the order they are computed with, too
        ctx.save_for_backward(x_TH, weight_TK, up_A, up_B, down_A, down_B, index_TK, *lows, kept_SO)
        ctx.weights, ctx.scalings = weights, scalings
        ctx.routing = (
            None if keep_up else routing
        )  # all layers' would be there at a time, which checkpointing is to avoid
        return _forward(routing, x_TH, weight_TK, up, down, weights, kept_SO)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # once only: under gradient checkpointing this is what computes the layer again
        with present(ctx.weights, saved[6], trains=True) as there:
            return _ExpertLayer._gradients(ctx, there, grads[0], *saved)

    @staticmethod
    def _gradients(
        ctx: Any, there: ExpertWeights, grad_TH: torch.Tensor, *saved: Any
    ) -> tuple[torch.Tensor | None, ...]:
        x_TH, weight_TK, up_A, up_B, down_A, down_B, index_TK, up_low, down_low, kept_SO = saved
        routing, needs_x = ctx.routing or _routing(index_TK, x_TH.dtype, there), ctx.needs_input_grad[0]
        up = _products(there.up, _factors(up_A, up_B, ctx.scalings[0]), routing, up_low, is_known=True)
        down = _products(there.down, _factors(down_A, down_B, ctx.scalings[1]), routing, down_low, is_known=True)
        weight_S1 = routing.sort(weight_TK).to(x_TH.dtype).unsqueeze(1)
        up_grads, down_grads = (products.gradients(routing.idle) for products in (up, down))
        layer = _Backward(
            ctx.weights, up, down, up_grads, down_grads, x_TH, weight_S1, grad_TH.contiguous(), kept_SO, needs_x
        )
        grad_x_TH = torch.zeros_like(x_TH) if needs_x else None
        grad_weight_S = weight_S1.new_zeros(weight_S1.shape[0])

        def collect(block: RowBlock, found: _Gradients) -> None:
            grad_weight_S[block.rows] = block.strip(found.weight_N)
            up_grads.add(block, found.up)
            down_grads.add(block, found.down)
            if grad_x_TH is not None and found.x_NH is not None:
                block.scatter_add(grad_x_TH, found.x_NH)

        _run(routing, layer.compute, collect, x_TH.device)
        grad_weight_TK = routing.unsort(grad_weight_S.to(weight_TK.dtype), weight_TK)
        return grad_x_TH, grad_weight_TK, up_grads.A, up_grads.B, down_grads.A, down_grads.B, *(None,) * 4


def kept_rows(rows: int, outputs: int, weights: ExpertWeights, dtype: torch.dtype) -> int:
    """How many rows of [S, O] are kept for backward: as many as take three tenths of the weights' bytes.

    Four bits count as int8: what is kept saves unpacking, too.
    """
    stored = sum(stack.weight.nbytes * (2 if stack.four_bits else 1) for stack in (weights.up, weights.down))
    return min(rows, int(_KEPT_OF_WEIGHTS * stored) // (outputs * dtype.itemsize))


def _factors(A: torch.Tensor | None, B: torch.Tensor | None, scaling: float) -> LoraFactors | None:
    return None if A is None or B is None else LoraFactors(A, B, scaling)


def _routing(index_TK: torch.Tensor, dtype: torch.dtype, there: ExpertWeights, *, are_few: bool = False) -> Routing:
    experts = there.up.experts
    if at_a_time := experts_at_a_time((there.up, there.down), index_TK.numel(), dtype):
        return EqualRouting(index_TK, experts, at_a_time)
    if are_few:
        return Routing.in_one_block(index_TK, experts)
    most_rows = _MOST_ROWS if index_TK.device.type == "cpu" else max(1, index_TK.shape[0])
    return Routing(index_TK, experts, most_rows)


def _products(
    stack: ExpertStack,
    lora: LoraFactors | None,
    routing: Routing,
    low: torch.Tensor | None = None,
    *,
    is_known: bool = False,
) -> Products | SmallProducts:
    if isinstance(routing, EqualRouting):
        return SmallProducts(stack, lora, routing)
    return Products.of(stack, lora, low, is_known=is_known)


def _run(
    routing: Routing,
    compute: Callable[[RowBlock], Any],
    collect: Callable[[RowBlock, Any], None],
    device: torch.device,
) -> None:
    with torch.autocast(device.type, enabled=False):
        run_in_order(
            routing.blocks,
            compute,
            collect,
            parallel=device.type == "cpu" and routing.is_shared_out and not routing.is_fake,
        )


@dataclass(frozen=True)
class _Gradients:
    """What one block of rows adds: to the input, the routing weights and either stack's factors."""

    x_NH: torch.Tensor | None
    weight_N: torch.Tensor
    up: list[FactorGradients | None]
    down: list[FactorGradients | None]


@dataclass(frozen=True)
class _Backward:
    weights: ExpertWeights
    up: Products | SmallProducts
    down: Products | SmallProducts
    up_grads: StackGradients | SmallGradients
    down_grads: StackGradients | SmallGradients
    x_TH: torch.Tensor
    weight_S1: torch.Tensor
    grad_TH: torch.Tensor
    kept_SO: torch.Tensor | None
    needs_x: bool

    def compute(self, block: RowBlock) -> _Gradients:
        x_NH = block.gather(self.x_TH)
        grad_NO, grad_weight_N, down = self._after_first(block, x_NH)
        grad_x_NH, up = self.up.backward(x_NH, grad_NO, block, needs_input=self.needs_x)
        return _Gradients(grad_x_NH, grad_weight_N, self.up_grads.take(block, up), self.down_grads.take(block, down))

    def _after_first(
        self, block: RowBlock, x_NH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[FactorGradients]]:
        """Gradients of the first projection's output [N, O], of the routing weights [N], and of the second's factors.

        What it computes them from is let go here, before the first projection's own.
        """
        if self.kept_SO is not None and block.is_within(self.kept_SO):
            y_NO = block.pad(self.kept_SO[block.rows])
        else:
            y_NO = self.up.forward(x_NH, block)
        hidden_NI, through_gate = _differentiable(self.weights.gate, y_NO)
        second = self._linear_second if self.weights.post_norm is None else self._through_norm
        grad_hidden_NI, grad_weight_N, factors = second(
            block, hidden_NI, block.gather(self.grad_TH), block.pad(self.weight_S1[block.rows])
        )
        return through_gate(grad_hidden_NI), grad_weight_N, factors

    def _linear_second(
        self, block: RowBlock, hidden_NI: torch.Tensor, grad_NH: torch.Tensor, weight_N1: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[FactorGradients]]:
        """Gradients of the second projection's input [N, I], of the routing weights [N], and of its factors."""
        # y = w·(h Wᵀ + b): with g the gradient of the row's sum, ∂w = ⟨h, g W⟩ + ⟨b, g⟩, so y itself is not needed.
        unweighted_NI, factors = self.down.backward(hidden_NI, grad_NH, block, weight_N1)
        assert unweighted_NI is not None
        grad_weight_N = (hidden_NI * unweighted_NI).sum(-1)
        if (through_bias_N := self.down.bias_products(grad_NH, block)) is not None:
            grad_weight_N += through_bias_N
        return unweighted_NI.mul_(weight_N1), grad_weight_N, factors

    def _through_norm(
        self, block: RowBlock, hidden_NI: torch.Tensor, grad_NH: torch.Tensor, weight_N1: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[FactorGradients]]:
        """As `_linear_second`, where a norm stands between the projection and the routing weight."""
        assert self.weights.post_norm is not None
        normed_NH, through_norm = _differentiable(self.weights.post_norm, self.down.forward(hidden_NI, block))
        grad_hidden_NI, factors = self.down.backward(hidden_NI, through_norm(grad_NH * weight_N1), block)
        assert grad_hidden_NI is not None
        return grad_hidden_NI, (normed_NH * grad_NH).sum(-1), factors


def _differentiable(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """function(x), detached, and what maps a gradient of it to one of x."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = function(leaf)
    return output.detach(), partial(_pull_back, output, leaf)


def _pull_back(output: torch.Tensor, leaf: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    (result,) = torch.autograd.grad(output, leaf, grad)
    return result
