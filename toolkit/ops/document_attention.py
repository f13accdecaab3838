"""Attention of packed documents one by one, on a CPU: nothing is computed that the mask would throw away.

A block-diagonal mask over L tokens costs L² whatever is in it; ten documents of L/10 tokens need a tenth of that.
FlashAttention does so on cards; for CPUs transformers has nothing, so its own SDPA function is called document by
document here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from toolkit.architecture import can_attend_per_document

__all__ = ["attend_to_documents", "per_document_attention"]

_NAME = "onecard_documents"


@contextmanager
def per_document_attention(model: PeftModel, implementation: str = _NAME) -> Iterator[bool]:
    """Within the block, attend document by document where a batch tells their lengths; yields whether it can.

    Models on a CPU that compute with transformers' SDPA can, but for those that ask for it by its name.
    Elsewhere nothing changes. `implementation` is the attention's name in transformers' registry.
    """
    base = model.get_base_model()
    can = base.device.type == "cpu" and can_attend_per_document(base)
    if can:
        base.set_attn_implementation(implementation)
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
    if len(lengths) > 1 and sum(lengths) == query.shape[2] == key.shape[2] and query.shape[0] == 1:
        return attend_to_documents(module, query, key, value, attention_mask, lengths, _is_causal, **kwargs)
    whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return whole


def attend_to_documents(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lengths: Sequence[int],
    is_causal: Callable[[torch.Tensor], bool],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of documents of these lengths, which add up to L, one after the other; whole where a bias is added.

    Args:
        query, key, value: [B, heads, L, d].
        is_causal: whether a document's mask is just that; then SDPA has a faster kernel, and repeats no key heads.
    """
    if kwargs.get("position_bias") is not None:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole
    outputs, start = [], 0
    for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        rows = slice(start, start + q.shape[2])
        mask = None if attention_mask is None else attention_mask[..., rows, rows]
        mask = None if mask is None or is_causal(mask) else mask
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
        start = rows.stop
    return torch.cat(outputs, dim=1), None


def _is_causal(mask: torch.Tensor) -> bool:
    seen = mask if mask.dtype == torch.bool else mask == 0
    return bool((seen == torch.ones_like(seen).tril()).all())


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
