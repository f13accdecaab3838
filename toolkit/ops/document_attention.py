"""Attention of packed documents one by one: nothing is computed that the mask would throw away.

A block-diagonal mask over L tokens costs L² whatever is in it; ten documents of L/10 tokens need a tenth of that. On a
CPU transformers' own SDPA function is called document by document. On a card torch's variable-length attention takes
all of them at once; transformers reaches it only where the package flash-attn is installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from toolkit.architecture import can_replace_sdpa
from toolkit.ops.few_queries import attention_of_few
from toolkit.ops.shared_prompts import attend_by_sight, attend_to_parts, parts_of

__all__ = [
    "NoMasks",
    "attend_to_documents",
    "attend_to_shared_prompts",
    "attend_together",
    "can_attend_together",
    "keep_lengths",
    "per_document_attention",
]

_NAME, _BARE = "onecard_documents", "onecard_documents_bare"
"""The attention's names in transformers' registry; under the second one it has no masks, and none are built."""
_LENGTHS = "onecard_lengths"
"""Attribute of a batch's cumulative lengths: the same as numbers on the host, which then never waits for a card."""
_TENSOR_CORES = (8, 0)
"""Compute capability from which torch has FlashAttention's kernels."""
_WIDEST, _MULTIPLE = 256, 8
"""Head dimensions that those take."""


@contextmanager
def per_document_attention(model: PeftModel, implementation: str = _NAME) -> Iterator[bool]:
    """Within the block, attend document by document where a batch tells their lengths; yields whether it can.

    Models that compute with transformers' SDPA can, but for those that ask for it by its name; on a card in 16 bit
    alone. Elsewhere nothing changes. `implementation` is the attention's name in transformers' registry.
    """
    base = model.get_base_model()
    can = can_replace_sdpa(base) and (base.device.type == "cpu" or _has_varlen(base))
    before = base.config._attn_implementation
    if can:
        base.set_attn_implementation(implementation)
    try:
        yield can
    finally:
        if can:
            base.set_attn_implementation(before)


@contextmanager
def attend_to_shared_prompts(model: PeftModel) -> Iterator[bool]:
    """Within the block, answers behind one prompt see it and themselves (`toolkit.ops.shared_prompts`); yields whether
    rows may be attended to part by part."""
    with per_document_attention(model) as takes_parts, attend_by_sight(model):
        yield takes_parts


class NoMasks:
    """Within the block, which is one of `per_document_attention`, no mask is built where every layer's is known.

    What a layer's mask was in a longer document it is in all shorter ones, and to build one means to wait for the card.
    `is_on` may be set to False. On a CPU documents are cut out of the mask, so there it is built.
    """

    def __init__(self, model: PeftModel) -> None:
        base = model.get_base_model()
        self.is_on, self._decoder, self._config = base.device.type == "cuda", base.base_model, base.config
        self._hooks: list[Any] = []

    def __enter__(self) -> NoMasks:
        if self.is_on:
            enter = self._decoder.register_forward_pre_hook(self._enter, with_kwargs=True)
            self._hooks = [enter, self._decoder.register_forward_hook(self._leave, always_call=True)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        lengths, given = _lengths(kwargs.get("cu_seq_lens_q")), kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        is_packed = len(lengths) > 1 and given is not None and given.shape[:2] == (1, sum(lengths))
        if self.is_on and is_packed and self._knows(max(lengths)):
            self._config._attn_implementation = _BARE

    def _leave(self, decoder: nn.Module, args: Any, output: Any) -> None:
        self._config._attn_implementation = _NAME

    def _knows(self, longest: int) -> bool:
        found = [(module, _known[module]) for module in self._decoder.modules() if module in _known]
        return bool(found) and all(
            known.window is not None and longest <= known.longest and module.training in known.modes
            for module, known in found
        )


def _has_varlen(base: PreTrainedModel) -> bool:
    """Whether the card has the kernels, and no layer sees by chunks, which are counted from the row's beginning."""
    if base.device.type != "cuda" or base.dtype not in (torch.bfloat16, torch.float16):
        return False
    chunked = getattr(base.config.get_text_config(), "attention_chunk_size", None) is not None
    if chunked or not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return False
    return torch.cuda.get_device_capability(base.device) >= _TENSOR_CORES  # and torch from 2.11 on


def keep_lengths(batch: dict[str, Any], lengths: Sequence[int]) -> None:
    """Note the lengths of a packed batch's documents on its tensor `cu_seq_lens_q`, which may be on a card."""
    setattr(batch["cu_seq_lens_q"], _LENGTHS, list(lengths))


def _lengths(bounds: torch.Tensor | None) -> list[int]:
    if bounds is None:
        return []
    kept: list[int] | None = getattr(bounds, _LENGTHS, None)
    return bounds.diff().tolist() if kept is None else kept


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
    lengths = _lengths(bounds)
    if len(lengths) > 1 and sum(lengths) == query.shape[2] == key.shape[2] and query.shape[0] == 1:
        if _takes_one_by_one(query):
            return attend_to_documents(module, query, key, value, attention_mask, lengths, _is_causal, **kwargs)
        assert bounds is not None
        known = _known.setdefault(module, _Known())
        known.modes.add(module.training)
        if not can_attend_together(query, key, value, kwargs):
            known.window = None
        window = _window(known, module, attention_mask, lengths, kwargs)
        if window is not None:
            return attend_together(query, key, value, bounds, max(lengths), window, kwargs.get("scaling")), None
    if parts := parts_of(attention_mask):
        return attend_to_parts(module, query, key, value, parts, **kwargs)
    return attention_of_few(module, query, key, value, attention_mask, **kwargs)


def _takes_one_by_one(query: torch.Tensor) -> bool:
    return query.device.type == "cpu"


def attend_together(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    window: int = -1,
    scaling: float | None = None,
) -> torch.Tensor:
    """Causal attention of all documents of a row in one launch: [1, L, heads, d], as transformers' functions give it.

    Args:
        query, key, value: [1, heads, L, d] in 16 bit; keys and values may have fewer heads, values a smaller d.
        bounds: cumulative lengths [documents + 1], int32. longest: of the documents, in tokens.
        window: tokens that each one sees behind it; -1 for all of its document.
    """
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))  # backward of an index is a copy
    width = v.shape[-1]
    v = pad(v, (0, q.shape[-1] - width)) if width < q.shape[-1] else v
    output = varlen_attn(
        q, k, v, bounds, bounds, longest, longest,
        scale=scaling, window_size=(window, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(output, torch.Tensor)
    return output[None, ..., :width]


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


def _is_causal(mask: torch.Tensor, window: int | None = None) -> bool:
    """Whether a document's mask cuts off the future, and what lies more than `window` tokens back, and nothing else."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    wanted = torch.ones_like(seen).tril()
    return bool((seen == (wanted if window is None else wanted.triu(-window))).all())


@dataclass
class _Known:
    """What a layer's mask was found to be, in documents of up to `longest` tokens; `window` None: neither form, or no
    kernel. `modes`: whether it was training when it was asked, since dropout has no kernel either."""

    longest: int = 0
    window: int | None = -1
    modes: set[bool] = field(default_factory=set)


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
_looked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of masks that live, which all layers of a kind are given: windows by rows and size, so that one layer looks."""


def _window(
    known: _Known, module: nn.Module, mask: torch.Tensor | None, lengths: Sequence[int], kwargs: dict[str, Any]
) -> int | None:
    """How far back a layer sees in these documents, -1 for all; None where its mask is neither causal nor a window.

    The mask is looked at once for each longer document: what it is in a long one it is in a short one, and looking
    waits for the card.
    """
    longest = max(lengths)
    if known.window is None or longest <= known.longest:
        return known.window
    if mask is None:
        causal = kwargs.get("is_causal")
        return -1 if (getattr(module, "is_causal", True) if causal is None else causal) else None
    start = sum(lengths[: lengths.index(longest)])
    rows, size = slice(start, start + longest), kwargs.get("sliding_window")
    known.longest = longest
    found = _looked.setdefault(mask, {})
    if (start, longest, size) not in found:
        found[start, longest, size] = _look(mask[..., rows, rows], size)
    known.window = found[start, longest, size]
    return known.window


def _look(mask: torch.Tensor, size: int | None) -> int | None:
    """What a document's mask is, see `_window`; `size` of a window that it may be."""
    if _is_causal(mask):
        return -1
    return size - 1 if size is not None and _is_causal(mask, size - 1) else None


def can_attend_together(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether torch's kernels compute this attention."""
    width = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and width == key.shape[-1] >= value.shape[-1]
        and width <= _WIDEST
        and width % _MULTIPLE == 0
        and query.shape[1] % key.shape[1] == 0
        and not kwargs.get("dropout")
        and not any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    )


AttentionInterface.register(_NAME, _attention)
AttentionInterface.register(_BARE, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
