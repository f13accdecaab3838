"""The loss of a training step by the trainer's own functions, on tensors without numbers.

On a CPU that is `toolkit.ops.label_logits`, or TRL's tiles where the logits would be too many; on a card TRL's tiles,
whose kernel cannot run here, so that its buffers are allocated in its stead. Where TRL's head does not give a family's
own logits, it is `label_logits` on both.
"""

# torch types an autograd function's result as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from toolkit.architecture import balancing_loss
from toolkit.ops.label_logits import (
    can_keep_logits,
    entropy_and_hits,
    forward_inputs,
    label_logits,
    pays_to_keep_logits,
    summed_loss,
)

__all__ = ["TILE_WORDS", "fake_loss"]

_TILE_TOKENS, TILE_WORDS = 4096, 32768
"""A tile of logits in TRL's fused head (`trl/kernels/chunked_logprob.py`, `trl/trainer/utils.py`)."""


def fake_loss(
    model: PeftModel,
    inputs: dict[str, torch.Tensor],
    labelled: int,
    *,
    balanced: bool,
    on_card: bool,
    trains: bool,
    whole_logits: bool = False,
) -> torch.Tensor:
    """A loss that backward can start from.

    Args:
        inputs: `input_ids`, `labels` and what else the forward takes. labelled: positions with a label, in a sequence.
        trains: whether it is the trainer's; held-out examples are judged by whole logits, on a card too.
        whole_logits: whether the trainer's is as well: of smoothed labels, or where TRL's head is not the family's.
    """
    labels, given = inputs.pop("labels"), forward_inputs(inputs, balanced=balanced)
    labelled = labelled if can_keep_logits(model) else labels.shape[1] - 1
    if trains and not whole_logits and (on_card or not pays_to_keep_logits(model, len(labels), labelled)):
        base = model.get_base_model()
        outputs = base.base_model(**given)
        hidden = outputs.last_hidden_state[:, :-1][:, :labelled].flatten(0, 1)
        tiled: torch.Tensor = _Tiles.apply(hidden, model.get_output_embeddings().weight, on_card)
        return tiled.sum() + _balance(base, outputs, balanced)
    logits, targets, outputs = label_logits(model, given, labels, labelled)
    loss = summed_loss(logits, targets)
    if balanced and outputs.get("aux_loss") is not None:
        loss = loss + outputs.aux_loss
    if trains:
        entropy_and_hits(logits.detach(), targets)
    return loss


def _balance(base: PreTrainedModel, outputs: Any, balanced: bool) -> torch.Tensor | float:
    """The load-balancing loss where the family gives router logits, by the family's own function."""
    logits, balance = outputs.get("router_logits") if balanced else None, balancing_loss(base)
    if not logits or balance is None:
        return 0.0
    config = base.config.get_text_config()
    return balance(logits, logits[0].shape[-1], getattr(config, "num_experts_per_tok", 2))


class _Tiles(torch.autograd.Function):
    """What TRL's fused head holds: a tile of logits, some numbers a token, and the rows' gradient in fp32.

    Where rows of the head are trained, the whole head's gradient too, in fp32 and in the head's dtype.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        hidden_NH, head_VH, ctx.on_card = args
        ctx.save_for_backward(hidden_NH, head_VH)
        statistics = [hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32) for _ in range(9)]
        _tile(hidden_NH, head_VH, ctx.on_card)
        return statistics[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, head_VH = ctx.saved_tensors
        grad_NH = hidden_NH.new_zeros(hidden_NH.shape, dtype=torch.float32)
        _tile(hidden_NH, head_VH, ctx.on_card)
        if not ctx.needs_input_grad[1]:
            return grad_NH.to(hidden_NH.dtype), None, None
        grad_VH = head_VH.new_zeros(head_VH.shape, dtype=torch.float32)
        return grad_NH.to(hidden_NH.dtype), grad_VH.to(head_VH.dtype), None


def _tile(hidden_NH: torch.Tensor, head_VH: torch.Tensor, on_card: bool) -> None:
    rows, words = min(len(hidden_NH), _TILE_TOKENS), min(TILE_WORDS, len(head_VH))
    buffer = hidden_NH.new_empty(rows, TILE_WORDS)
    if not on_card:  # folded by torch's operators, three tiles in fp32 at a time
        parts = [buffer.new_empty(rows, words, dtype=torch.float32) for _ in range(4)]
        del parts
    del buffer
