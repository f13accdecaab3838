"""Attention with a sink a head through torch's SDPA, which keeps no matrix of scores.

A sink is a logit that every softmax of its head has beside those of the keys, and that carries no value (gpt-oss).
transformers computes it in plain operations alone: some eight matrices [heads, T, T] a layer. Here the sink is one more
key: its value is zero, and a further width, in which all queries are 1 and the other keys 0, holds the sink.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from toolkit.architecture import can_attend_with_sinks

__all__ = ["SINKS", "attend_with_sinks", "attention_with_sinks"]

SINKS = "onecard_sinks"
"""The attention's name in transformers' registry."""
_MULTIPLE = 8
"""Of the widths that SDPA's kernels take on a card in 16 bit."""
_FEW = 16
"""Queries up to which their scores are computed as they stand: those of a decoding step."""


def attend_with_sinks(model: PreTrainedModel) -> bool:
    """Attend this way in a model that would compute its sinks in plain operations; whether it does."""
    can = can_attend_with_sinks(model)
    if can:
        model.set_attn_implementation(SINKS)
    return can


def attention_with_sinks(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions: [B, T, heads, d] of a query [B, heads, T, d].

    Args:
        key, value: [B, heads or fewer, M, d], values of another width if need be.
        attention_mask: [B, 1, T, M], bool or to be added; without one, the last query sees all keys, and no query what
            comes after it.
        kwargs: `s_aux`, the sinks [heads] or None; `scaling`, `dropout` and what SDPA's function takes.
    """
    sinks: torch.Tensor | None = kwargs.pop("s_aux", None)
    if sinks is None:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole
    queries, keys = query.shape[2], key.shape[2]
    scaling: float = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    dropout: float = kwargs.get("dropout") or 0.0
    if attention_mask is None:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[
            None, None
        ]
    attend = _few if queries <= _FEW and not dropout else _many
    output = attend(query, key, value, attention_mask[..., :keys], sinks.to(query.dtype), scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


def _many(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    sinks: torch.Tensor,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    heads, width, wide = query.shape[1], query.shape[-1], value.shape[-1]
    room = -(-(max(width + 1, wide)) // _MULTIPLE) * _MULTIPLE
    groups = heads // key.shape[1]
    sink = pad((sinks / scaling)[None, :, None, None], (width, room - width - 1)).expand(query.shape[0], -1, -1, -1)
    q = torch.cat((query, torch.ones_like(query[..., :1]), query.new_zeros(*query.shape[:-1], room - width - 1)), -1)
    k = torch.cat((sink, pad(key, (0, room - width)).repeat_interleave(groups, 1)), 2)
    v = pad(value, (0, room - wide, 1, 0)).repeat_interleave(groups, 1)
    seen = pad(mask, (1, 0), value=mask.dtype == torch.bool)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling)[..., :wide]


def _few(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    sinks: torch.Tensor,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """No key is copied for the heads that share it."""
    batch, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    together = query.reshape(batch, key.shape[1], groups * queries, width)
    scores = (together @ key.transpose(-1, -2)).view(batch, heads, queries, -1).float() * scaling
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    last = sinks.float()[None, :, None, None].expand(batch, -1, queries, 1)
    shares = torch.cat((scores, last), -1).softmax(-1)[..., :-1].to(value.dtype)
    output = shares.view(batch, key.shape[1], groups * queries, -1) @ value
    return output.view(batch, heads, queries, -1)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' own, which is never left out: SDPA knows no causal mask with a further key."""
    found: torch.Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return found


AttentionInterface.register(SINKS, attention_with_sinks)
AttentionMaskInterface.register(SINKS, _mask)
