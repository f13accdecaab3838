"""Attention of packed documents one by one, on a CPU: nothing is computed that the mask would throw away.

A block-diagonal mask over L tokens costs L² whatever is in it; ten documents of L/10 tokens need a tenth of that.
FlashAttention does so on cards; for CPUs transformers has nothing, so its own SDPA function is called document by
document here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from toolkit.architecture import can_attend_apart

__all__ = ["documents_apart"]

_NAME = "onecard_documents"


@contextmanager
def documents_apart(model: PeftModel) -> Iterator[bool]:
    """Within the block, attend document by document where a batch tells their lengths; yields whether it can.

    Models on a CPU that compute with transformers' SDPA can, but for those that ask for it by its name.
    Elsewhere nothing changes.
    """
    base = model.get_base_model()
    can = base.device.type == "cpu" and can_attend_apart(base)
    if can:
        base.set_attn_implementation(_NAME)
    try:
        yield can
    finally:
        if can:
            base.set_attn_implementation("sdpa")


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' SDPA function; query, key and value [1, heads, L, d]."""
    bounds = kwargs.get("cu_seq_lens_q")
    lengths = [] if bounds is None else bounds.diff().tolist()
    splits = len(lengths) > 1 and sum(lengths) == query.shape[2] == key.shape[2] and kwargs.get("position_bias") is None
    if not splits or query.shape[0] != 1:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole
    outputs, start = [], 0
    for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        rows = slice(start, start + q.shape[2])
        mask = None if attention_mask is None else _unless_causal(attention_mask[..., rows, rows])
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
        start = rows.stop
    return torch.cat(outputs, dim=1), None


def _unless_causal(mask: torch.Tensor) -> torch.Tensor | None:
    """None for a mask that is just causal, for which SDPA has a faster kernel and needs no repeated key heads."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    return None if bool((seen == torch.ones_like(seen).tril()).all()) else mask


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
