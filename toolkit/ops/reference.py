"""The law: the expert layer in plain autograd, every weight multiplied out, one expert after the other.

    T tokens, K experts per token, E experts, H hidden, O and I a projection's outputs and inputs, R rank
    h_e = gate(x W_upᵉᵀ + b),  y_t = Σ_k w_tk · norm(h_e W_downᵉᵀ + b),  W ← W + scaling · B_e A_e where adapted

Fast paths are checked against it; nothing here is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from toolkit.ops.factors import LoraFactors
from toolkit.ops.presence import present

if TYPE_CHECKING:  # it computes with anything alike: scripts/gpu_check.py has no transformers, which that room needs
    from toolkit.ops.experts import ExpertStack, ExpertWeights

__all__ = ["expert_layer"]


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
    """The weighted sum of every token's experts: [T, H], in x's dtype. Autograd keeps everything, whatever is asked."""
    # Multiplied out they are copies, which autograd keeps: a streamed stack is not asked for again.
    with present(weights, index_TK, trains=False) as there:
        up_EOI, down_EOI = _effective(there.up, up_lora, x_TH.dtype), _effective(there.down, down_lora, x_TH.dtype)
    out_TH = torch.zeros_like(x_TH)
    for expert in range(up_EOI.shape[0]):
        token, slot = torch.where(index_TK == expert)
        hidden = weights.gate(_affine(x_TH[token], up_EOI[expert], weights.up.bias, expert))
        output = _affine(hidden, down_EOI[expert], weights.down.bias, expert)
        if weights.post_norm is not None:
            output = weights.post_norm(output)
        out_TH = out_TH.index_add(0, token, (output * weight_TK[token, slot, None]).to(x_TH.dtype))
    return out_TH


def _effective(stack: ExpertStack, lora: LoraFactors | None, dtype: torch.dtype) -> torch.Tensor:
    weight = stack.dequantized().to(dtype)
    return weight if lora is None else weight + (lora.scaling * (lora.B @ lora.A)).to(dtype)


def _affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, expert: int) -> torch.Tensor:
    y = x @ weight.t()
    return y if bias is None else y + bias[expert].to(y.dtype)
