"""Routed rows in expert order, as indices only: no row is moved, and the host never learns how many an expert has.

torch's own `bincount` waits for the device to know its output's size; a search in the sorted expert numbers does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["SortedRows", "route"]


@dataclass(frozen=True)
class SortedRows:
    """S = T·K rows sorted by expert, tokens ascending in each.

    token [S]: the token of a sorted row. slot [S]: its place in the flattened [T, K]. place [T, K]: the sorted row of a
    token's slot, -1 where its expert number is none of ours. offset [E + 1]: where each expert's rows begin. All int32
    but slot.
    """

    token: torch.Tensor
    slot: torch.Tensor
    place: torch.Tensor
    offset: torch.Tensor


def route(index_TK: torch.Tensor, num_experts: int) -> SortedRows:
    """Sort the slots by expert. Numbers from `num_experts` on (other devices' experts) sort last and count nothing."""
    flat = index_TK.reshape(-1)
    ordered, slot = flat.sort(stable=True)
    offset = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=flat.device, dtype=flat.dtype))
    place = torch.empty_like(slot, dtype=torch.int32)
    place[slot] = torch.arange(slot.shape[0], device=flat.device, dtype=torch.int32)
    place = torch.where(flat < num_experts, place, -1).view(index_TK.shape)
    token = slot.div(index_TK.shape[1], rounding_mode="floor").int()
    return SortedRows(token, slot, place, offset.int())
