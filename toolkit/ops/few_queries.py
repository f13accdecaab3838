"""SDPA of a few queries on a CPU, where heads share keys: what a decoding step is made of, beside products.

torch multiplies head after head, in bf16 at a price for each product that a row or ten make no difference to. Queries
whose heads share keys become the rows of one head, and no key is repeated: 16 sequences of 64 tokens, 9 heads on 3 of
keys, take 0.1 instead of 0.5 ms a layer, and 32 heads on 4 take 0.3 instead of 3 (AMD Zen 4, two threads). transformers
does so for one query with a mask, uses torch's grouped kernel without one, and repeats keys for several queries.

    B sequences, N queries, M keys, d width of a head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from toolkit.architecture import FEW_QUERIES, can_replace_sdpa

__all__ = ["attend_to_few_together", "attention_of_few"]

_MOST = 16
"""Queries of a sequence; of more, a product's price no longer counts."""
_OTHERS = ("position_bias", "softcap", "s_aux", "cache")
"""Arguments of transformers' attention functions that are not computed here."""


def attend_to_few_together(model: PreTrainedModel) -> bool:
    """Decode this way, where the model is on a CPU and computes with transformers' SDPA; whether it does."""
    can = model.device.type == "cpu" and can_replace_sdpa(model)
    if can:
        model.set_attn_implementation(FEW_QUERIES)
    return can


def attention_of_few(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' SDPA function, which computes all other cases: [B, N, heads, d] of a query [B, heads, N, d].

    Args:
        key, value: [B, heads or fewer, M, d], values of another width if need be.
        attention_mask: [B or 1, 1 or heads, N, M], bool or to be added.
    """
    batch, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    if groups == 1 or not _are_few(query, attention_mask, kwargs):
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole
    if attention_mask is not None and queries > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    together = query.reshape(batch, -1, groups * queries, width)
    output = nn.functional.scaled_dot_product_attention(
        together, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling")
    )
    return output.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


def _are_few(query: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> bool:
    """One query in fp32 is left as it is: there torch's grouped kernel is as fast."""
    queries = query.shape[2]
    is_shared = mask is not None and mask.shape[1] == 1
    return (
        query.device.type == "cpu"
        and queries <= _MOST
        and ((queries == 1 and query.dtype == torch.bfloat16 and mask is None) or (queries > 1 and is_shared))
        and not torch.is_grad_enabled()
        and not kwargs.get("dropout")
        and not kwargs.get("output_attentions")
        and all(kwargs.get(name) is None for name in _OTHERS)
    )


AttentionInterface.register(FEW_QUERIES, attention_of_few)
AttentionMaskInterface.register(FEW_QUERIES, sdpa_mask)
