"""Norms as autocast has them on a card: in fp32, where autocast on a CPU leaves them in 16 bit.

A plan's tensors are on no card. Behind torch's own layer norm a family's hidden states are fp32 from layer to layer,
and so is all that gradient checkpointing keeps. What else a card takes to fp32 is inside of a layer, and families ask
for most of it themselves: it moves a step by a thousandth at most.
Source: `AT_FORALL_FP32` in torch's ATen/autocast_mode.h.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["NORMS", "CardAutocast", "run_again"]

NORMS = frozenset({"group_norm", "layer_norm", "rms_norm"})
"""Functions whose inputs are taken to fp32."""


class CardAutocast(TorchFunctionMode):
    """Where autocast is on for the CPU, norms are computed as on a card."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in NORMS and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_in_fp32, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def run_again() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What checkpointed layers run in, and what they run again in, where autograd has left all modes of functions."""
    return nullcontext(), CardAutocast()


def _in_fp32(value: Any) -> Any:
    is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value
