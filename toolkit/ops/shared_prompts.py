"""Several answers to one prompt in one sequence: the prompt, which they share, is computed once.

Methods that compare answers to a prompt with each other pass each of them through the model with the prompt before it.
In a causal model the prompt's states do not depend on what follows. So a row is here the prompt but for its last token,
and then for each answer that token and the answer; an answer sees the prompt and itself, and its positions go on from
the prompt's. Nothing else is different: the same log-probabilities, and the same gradients added up in other order.

    B sequences, S of them to each of G prompts; L tokens of the longest sequence, R of a row
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

from toolkit.labels import IGNORED

__all__ = [
    "WIDE",
    "SharedPrompts",
    "attend_by_sight",
    "attend_to_parts",
    "parts_of",
    "share_prompts",
    "with_sight",
]

_SIGHT = "onecard_sight"
"""Attribute of a mask [G, R]: which of its row's tokens each token sees [G, 1, R, R]."""
_PARTS = "onecard_parts"
"""Attribute of what tokens see, whose values then say nothing: the parts of each row, as in `with_sight`."""
WIDE = 256
"""Tokens of a row above which a product for each answer is cheaper than one with all of them."""
_MOST_SEEN = 1 << 26
"""Bytes that a table of what each token sees may take."""


@dataclass(frozen=True)
class SharedPrompts:
    """Rows for one forward pass.

    `inputs` are the model's, with a mask that says for how many sequences a token stands; `labels` [G, R] as in the
    sequences; `places` [B, L-1] where, among all rows' R-1 predictions each, those of a sequence stand.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    places: torch.Tensor

    def of_sequences(self, values_GR: torch.Tensor) -> torch.Tensor:
        """Values of the rows' predictions [G, R-1] as those of sequences [B, L-1]; without meaning in the prompt."""
        return values_GR.flatten()[self.places]


def share_prompts(
    ids_BL: torch.Tensor, mask_BL: torch.Tensor, labels_BL: torch.Tensor, share: int, *, wide: int | None = None
) -> SharedPrompts | None:
    """Rows in which `share` sequences that follow each other have what they begin with once.

    None where a group has nothing in common, or where what tokens see would take too much memory.

    Args:
        ids_BL, mask_BL, labels_BL: padded on the right; IGNORED where a token is not predicted.
        wide: tokens of a row above which it is attended to part by part, by an attention function that asks `parts_of`.
            Without it, none is.
    """
    length, device = ids_BL.shape[1], ids_BL.device
    ids_GSL, labels_GSL = (each.view(-1, share, length) for each in (ids_BL, labels_BL))
    rows, sizes_GS = len(ids_GSL), mask_BL.view(-1, share, length).sum(2)
    before_G1 = _shared_tokens(ids_GSL, labels_GSL, sizes_GS)[:, None] - 1  # the last of them begins each answer
    least, width = int(before_G1.min()), int(before_G1.max())
    if least < 0:
        return None

    most = length - least
    steps = torch.arange(most, device=device)
    places_GSK = (before_G1[..., None] + steps).expand(-1, share, -1)
    reads_GA = (places_GSK < sizes_GS[..., None]).flatten(1)
    order_GA = (~reads_GA).to(torch.uint8).argsort(dim=1, stable=True)  # padding between answers goes to the end
    first_GA = order_GA[:, : int(reads_GA.sum(1).max())]
    taken_GSK = places_GSK.clamp(max=length - 1)
    wanted_GSK = labels_GSL.gather(2, taken_GSK).masked_fill(steps == 0, IGNORED)

    def answers(each_GSK: torch.Tensor) -> torch.Tensor:
        return each_GSK.flatten(1).gather(1, first_GA)

    slots = torch.arange(width, device=device).expand(rows, -1)
    there = torch.cat([slots < before_G1, reads_GA.gather(1, first_GA)], dim=1)
    owner = torch.cat([torch.zeros_like(slots), first_GA // most + 1], dim=1)
    ids = torch.cat([ids_GSL[:, 0, :width], answers(ids_GSL.gather(2, taken_GSK))], dim=1)
    labels = torch.cat([torch.full_like(slots, IGNORED), answers(wanted_GSK)], dim=1).masked_fill(~there, IGNORED)
    positions = torch.cat([slots, answers(places_GSK)], dim=1)

    size = ids.shape[1]
    mask, parts = torch.where(owner == 0, share, 1) * there, list[list[int]]()
    if wide is not None and size > wide:
        sizes = torch.cat([before_G1, sizes_GS - before_G1], dim=1).tolist()
        parts = [[width, *each] for each in sizes]
        sees = there.new_ones(1, 1, 1, 1).expand(rows, 1, size, size)
    elif rows * size**2 > _MOST_SEEN:
        return None
    else:
        sees = _seen(owner, there)[:, None]
    inputs = {"input_ids": ids, "attention_mask": with_sight(mask, sees, parts), "position_ids": positions}

    slots_GSK = width + order_GA.argsort(dim=1).view(rows, share, most)
    asked_GSP = (torch.arange(length - 1, device=device) - before_G1).clamp(min=0)[:, None].expand(-1, share, -1)
    found_GSP = slots_GSK.gather(2, asked_GSP).clamp(max=size - 2)
    found_GSP = found_GSP + (size - 1) * torch.arange(rows, device=device)[:, None, None]
    return SharedPrompts(inputs, labels, found_GSP.flatten(0, 1))


def _shared_tokens(ids_GSL: torch.Tensor, labels_GSL: torch.Tensor, sizes_GS: torch.Tensor) -> torch.Tensor:
    """Tokens that the sequences of each group begin with in common, before the first that any has a label for [G]."""
    same_GL = (ids_GSL == ids_GSL[:, :1]).all(1) & (labels_GSL == IGNORED).all(1)
    return torch.minimum(same_GL.long().cumprod(1).sum(1), sizes_GS.min(1).values)


def _seen(owner_GR: torch.Tensor, there_GR: torch.Tensor) -> torch.Tensor:
    """Which of its row's tokens each token sees [G, R, R]. Padding, too, has to see something: itself."""
    shared_or_own = (owner_GR[:, None, :] == 0) | (owner_GR[:, None, :] == owner_GR[:, :, None])
    itself = torch.eye(owner_GR.shape[1], dtype=torch.bool, device=owner_GR.device)
    return (torch.ones_like(itself).tril() & shared_or_own & there_GR[:, None, :]) | itself


def with_sight(mask_GR: torch.Tensor, sees_G1RR: torch.Tensor, parts: Sequence[Sequence[int]] = ()) -> torch.Tensor:
    """The mask, which a decoder with `attend_by_sight` replaces by what each token sees.

    `parts` [G][2 + S], where rows are to be attended to part by part: the prompt's width, the same in all rows, how
    many tokens of it there are, and each answer's. What tokens see is then not looked at.
    """
    if parts:
        setattr(sees_G1RR, _PARTS, parts)
    setattr(mask_GR, _SIGHT, sees_G1RR)
    return mask_GR


def parts_of(mask: torch.Tensor | None) -> Sequence[Sequence[int]]:
    """The parts of each row, where what a layer is given as its mask has them."""
    found: Sequence[Sequence[int]] = getattr(mask, _PARTS, ())
    return found


def attend_to_parts(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Sequence[Sequence[int]],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' SDPA function: the prompt for itself, then each answer to the prompt and to itself.

    Args:
        query, key, value: [G, heads, R, d]. parts: as in `with_sight`.
    """
    outputs = []
    for row, (width, held, *answers) in enumerate(parts):
        q, k, v = (each[row : row + 1] for each in (query, key, value))
        ends = [width + sum(answers[:count]) for count in range(len(answers) + 1)]
        ends[-1] = q.shape[2]  # padding is computed with the last answer
        longest = max(width, *(end - start for start, end in pairwise(ends)))
        causal = torch.ones(1, 1, longest, longest, dtype=torch.bool, device=q.device).tril()
        prompt = (torch.arange(width, device=q.device) < held).expand(1, 1, longest, -1)
        done = []
        if width:
            own = (each[:, :, :width] for each in (q, k, v))
            done.append(sdpa_attention_forward(module, *own, causal[..., :width, :width], **kwargs)[0])
        for start, end in pairwise(ends):
            own_k, own_v = (torch.cat([each[:, :, :width], each[:, :, start:end]], dim=2) for each in (k, v))
            sees = torch.cat([prompt[..., : end - start, :], causal[..., : end - start, : end - start]], dim=3)
            done.append(sdpa_attention_forward(module, q[:, :, start:end], own_k, own_v, sees, **kwargs)[0])
        outputs.append(torch.cat(done, dim=1))
    return torch.cat(outputs), None


@contextmanager
def attend_by_sight(model: PeftModel) -> Iterator[None]:
    """Within the block, the model's decoder attends by what tokens of a mask `with_sight` see.

    What counts tokens outside the decoder, such as a load-balancing loss, is given the mask itself.
    """
    base = model.get_base_model()

    def replace(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        sees = getattr(kwargs.get("attention_mask"), _SIGHT, None)
        if sees is None:
            return args, kwargs
        if ALL_MASK_ATTENTION_FUNCTIONS[base.config._attn_implementation] is eager_mask:
            hidden = torch.finfo(base.dtype).min
            sees = torch.zeros_like(sees, dtype=base.dtype).masked_fill(~sees, hidden)
        return args, {**kwargs, "attention_mask": sees}

    hook = base.base_model.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
