"""Logits of the positions that carry a label, and of no other.

With answers a tenth of the tokens, nine tenths of the largest product of a small model's step are thrown away. TRL
leaves them out on cards only; transformers' own `logits_to_keep` does it anywhere, in every family that has it.

    B sequences, L tokens in each, N labelled ones of all, V vocabulary
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import nn

__all__ = ["can_keep_logits", "labelled_logits"]


def can_keep_logits(model: nn.Module) -> bool:
    """Whether the model's forward takes `logits_to_keep`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters


def labelled_logits(
    model: nn.Module, inputs: dict[str, Any], labels_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Logits [N, V] that predict a label, the labels [N], and the model's outputs.

    Args:
        inputs: of the model's forward, labels left out.
        labels_BL: token ids, -100 where there is none. A label belongs to the position before it.
    """
    wanted = labels_BL[:, 1:] != -100
    if not can_keep_logits(model):
        outputs = model(**inputs)
        return outputs.logits[:, :-1][wanted], labels_BL[:, 1:][wanted], outputs
    # One position at least: none would mean all of them.
    positions = wanted.any(0).nonzero().flatten() if wanted.any() else wanted.new_zeros(1, dtype=torch.long)
    outputs = model(**inputs, logits_to_keep=positions)
    kept = wanted[:, positions]
    return outputs.logits[kept], labels_BL[:, 1:][:, positions][kept], outputs
