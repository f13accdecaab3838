"""Logits of the positions that carry a label, and of no other; and the loss and figures of those.

With answers a tenth of the tokens, nine tenths of the largest product of a small model's step are thrown away. TRL
leaves them out on cards only; transformers' own `logits_to_keep` does it anywhere, in every family that has it.

    B sequences, L tokens in each, P positions whose logits are kept, N labels, V vocabulary
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy, pad

from toolkit.architecture import unwrapped
from toolkit.labels import IGNORED

__all__ = [
    "can_keep_logits",
    "entropy_and_hits",
    "forward_inputs",
    "label_logits",
    "labels_ahead",
    "padded",
    "pays_to_keep_logits",
    "summed_loss",
]

_MOST_LOGITS = 1 << 28
"""Bytes of logits that may exist at once on a CPU before they are computed in chunks."""


def can_keep_logits(model: nn.Module) -> bool:
    """Whether the model's forward takes `logits_to_keep`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters


def pays_to_keep_logits(model: PeftModel, sequences: int, positions: int) -> bool:
    """Whether a CPU computes this many positions' logits at once; with more of them TRL's chunks need less memory."""
    words = len(unwrapped(model.get_output_embeddings()).get_parameter("weight"))
    size = sequences * positions * words * model.dtype.itemsize
    return can_keep_logits(model) and bool(size <= _MOST_LOGITS)


def forward_inputs(inputs: dict[str, Any], *, balanced: bool) -> dict[str, Any]:
    """What the forward is given for a training loss: all but the labels. `balanced`: with the load-balancing loss."""
    unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
    return {**unlabelled, "use_cache": False, **({"output_router_logits": True} if balanced else {})}


def labels_ahead(labels_BL: torch.Tensor) -> torch.Tensor:
    """The label that each position predicts [B, L]; the last one predicts none."""
    return pad(labels_BL[:, 1:], (0, 1), value=IGNORED)


def padded(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int = 0, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and labels, [B, L] each, of rows of `input_ids` and `labels`, padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, device=device)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length], labels[index, :length] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        mask[index, :length] = 1
    return ids, mask, labels


def label_logits(
    model: nn.Module, inputs: dict[str, Any], labels_BL: torch.Tensor, count: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Logits [N, V] that predict a label, the labels [N], and the model's outputs.

    Args:
        inputs: of the model's forward, labels left out.
        labels_BL: token ids, IGNORED where there is none. A label belongs to the position before it.
        count: labels in each sequence, where the tensors have shapes alone and cannot be asked; those come first.
    """
    keeps = can_keep_logits(model)
    positions_P = _positions(labels_BL, count) if keeps else torch.arange(labels_BL.shape[1], device=labels_BL.device)
    outputs = model(**inputs, **({"logits_to_keep": positions_P} if keeps else {}))
    if count is not None:
        rows, labels_N = torch.ones(len(labels_BL) * count, dtype=torch.long), labels_BL[:, :count].flatten()
    else:
        kept_BP = labels_ahead(labels_BL)[:, positions_P]
        rows = kept_BP.flatten() != IGNORED
        labels_N = kept_BP.flatten()[rows]
    return outputs.logits.flatten(0, 1)[rows], labels_N, outputs


def _positions(labels_BL: torch.Tensor, count: int | None) -> torch.Tensor:
    """Which positions predict a label in any sequence: one at least, since none would mean all of them."""
    if count is not None:
        return torch.zeros(count, dtype=torch.long)
    wanted_L = (labels_BL[:, 1:] != IGNORED).any(0)
    return wanted_L.nonzero().flatten() if wanted_L.any() else wanted_L.new_zeros(1, dtype=torch.long)


def summed_loss(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, *, label_smoothing: float = 0.0, dft: bool = False
) -> torch.Tensor:
    """The labels' cross entropies in nats, added up in fp32.

    Args:
        label_smoothing: share of each label that is spread over the vocabulary.
        dft: each is weighed by the label's probability, through which nothing flows back (arXiv 2508.05629).
    """
    if not dft:
        return cross_entropy(logits_NV.float(), labels_N, reduction="sum", label_smoothing=label_smoothing)
    losses_N = cross_entropy(logits_NV.float(), labels_N, reduction="none")
    return (losses_N * (-losses_N).exp().detach()).sum()


def entropy_and_hits(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entropies in nats, added up, and how many labels have the highest logit."""
    log_probabilities_NV = logits_NV.float().log_softmax(-1)
    entropy = -(log_probabilities_NV.exp() * log_probabilities_NV).sum()
    return entropy, (log_probabilities_NV.argmax(-1) == labels_N).sum()
