"""Whether packed examples stay apart: asked of the model before the first step.

TRL packs by position ids that restart at each document. transformers turns those into a block-diagonal mask, but some
models do not hand their position ids on to the mask (gpt-oss in transformers 5.23), and recurrent layers carry state
across. So two documents are run before training, and a leak is mended or refused, never trained on.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.masking_utils import create_masks_for_generate

from toolkit.architecture import CACHE_NAMES
from toolkit.errors import ModelError, cannot_pack, first_sentence

__all__ = ["isolate_documents", "leaks"]

_PROBED = 12
"""Tokens of each of the two documents that are run."""
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest share of the logits' spread that rounding may change: 5e-6 in fp32 with kernels of three kinds. A leak: 1."""


def isolate_documents(model: PeftModel) -> bool:
    """Make packed documents invisible to each other, and prove it.

    Returns whether masks had to be built here (a forward pre-hook on the decoder then does, for the model's lifetime).

    Raises:
        ModelError: documents still see each other, or layers of the family refuse them, so it cannot be trained packed.
    """
    name = type(model.get_base_model()).__name__
    try:
        if not leaks(model):
            return False
    except ValueError as error:
        if not cannot_pack(error):
            raise
        raise ModelError(f"{name}: {first_sentence(error)}; set training.packing=false") from None
    decoder = model.get_base_model().base_model
    hook = decoder.register_forward_pre_hook(_mask_documents, with_kwargs=True)
    try:
        is_apart = not leaks(model)
    except (LookupError, TypeError):  # of layers that take other masks than attention's
        is_apart = False
    if not is_apart:
        hook.remove()
        raise ModelError(f"{name}: packed examples would see each other in this family; set training.packing=false")
    return True


def _mask_documents(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    positions = kwargs.get("position_ids")
    if positions is None or any(kwargs.get(name) is not None for name in ("attention_mask", *CACHE_NAMES)):
        return args, kwargs
    shape = torch.empty((*positions.shape, 1), dtype=decoder.dtype, device=positions.device)  # type: ignore[call-overload]
    masks = create_masks_for_generate(decoder.config, shape, None, None, position_ids=positions)
    return args, {**kwargs, "attention_mask": masks}


@torch.no_grad()
def leaks(model: PeftModel) -> bool:
    """Whether the second of two packed documents changes when the first does.

    Raises:
        ValueError: of transformers, where layers with a running state refuse packed documents.
    """
    was_training = model.training
    model.eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(2 * _PROBED, device=device) * 7 + 3)[None] % vocabulary
    other = ids.clone()
    other[:, :_PROBED] = (ids[:, :_PROBED] + vocabulary // 2) % vocabulary
    before, after = (_second_document(model, row) for row in (ids, other))
    model.train(was_training)
    return bool((after - before).abs().max() > _TOLERANCE[model.dtype] * before.std())


def _second_document(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    steps = torch.arange(_PROBED, device=ids.device)
    bounds = torch.tensor([0, _PROBED, 2 * _PROBED], dtype=torch.int32, device=ids.device)
    # As TRL's collator has it: position ids for masks, cumulative lengths for FlashAttention, indices for state spaces.
    logits: torch.Tensor = model(
        input_ids=ids,
        position_ids=torch.cat([steps, steps])[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=_PROBED,
        max_length_k=_PROBED,
        seq_idx=torch.arange(2, dtype=torch.int32, device=ids.device).repeat_interleave(_PROBED)[None],
        use_cache=False,
    ).logits
    return logits[:, _PROBED:].float()
