"""Bytes of a multi-token-prediction head in training, from shapes alone; no library knows of one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["experts_per_token", "head_bytes", "head_parameters"]

_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
)
_BYTES = 16
"""Of a parameter that trains in fp32: weight, gradient and AdamW's two moments."""


def head_parameters(model: nn.Module, config: Any, num_mtp_layers: int) -> int:
    """Parameters of a new head: projection, norms, a copy of the last block, and one dense SwiGLU for its experts.

    Args:
        model: on the meta device. config: the model's text config.
    """
    from toolkit.architecture import is_experts

    layer = model.get_decoder().layers[-1]  # type: ignore[operator]
    hidden = int(config.hidden_size)
    holding = {name.split(".")[0]: module for name, module in layer.named_modules() if is_experts(module)}
    kept = sum(math.prod(p.shape) for name, p in layer.named_parameters() if name.split(".")[0] not in holding)
    dense = sum(3 * hidden * _inner(experts) * experts_per_token(config) for experts in holding.values())
    total: int = num_mtp_layers * (2 * hidden * hidden + 3 * hidden + kept + dense)
    return total


def head_bytes(parameters: int) -> int:
    """Bytes of a new head of so many parameters, with its gradients and its optimizer."""
    return _BYTES * parameters


def _inner(experts: Any) -> int:
    shape = experts.down_proj.shape
    return int(shape[1] if experts.is_transposed else shape[2])


def experts_per_token(config: Any, otherwise: int = 1) -> int:
    """Experts that a token has, by the names that configs give their number; `otherwise` where they give none."""
    found = (getattr(config, name, None) for name in _PER_TOKEN)
    return next((int(number) for number in found if isinstance(number, int)), otherwise)
