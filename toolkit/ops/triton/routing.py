"""Routed rows in expert order, as indices only: no row is moved, and the host never learns how many an expert has.

torch's own `bincount` waits for the device to know its output's size, and writing through an index sorts once more
where algorithms are to be deterministic: a sort and one kernel take the place of thirty launches.
"""

# Kernel arguments carry no annotations but constexpr: Triton reads them as its own types. torch types a custom
# operator's result as Any.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from toolkit.ops.triton.tiles import power_of_two

__all__ = ["SortedRows", "place_rows_kernel", "route"]

_BLOCK = 256


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
    ordered, slot = index_TK.reshape(-1).sort(stable=True)
    token, place, offset = place_rows(ordered, slot, index_TK.shape[1], num_experts)
    return SortedRows(token, slot, place.view(index_TK.shape), offset)


@torch.library.custom_op("onecard::place_rows", mutates_args=())
def place_rows(
    ordered: torch.Tensor, slot: torch.Tensor, top_k: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token [S], place [S] and offset [E + 1] of `SortedRows`, from sorted expert numbers [S] and their slots [S]."""
    rows = slot.shape[0]
    token, place = (slot.new_empty(rows, dtype=torch.int32) for _ in range(2))
    offset = slot.new_empty(num_experts + 1, dtype=torch.int32)
    place_rows_kernel[(max(1, triton.cdiv(rows, _BLOCK)),)](
        ordered, slot, token, place, offset, rows, top_k, num_experts, rows.bit_length(), BLOCK=_BLOCK,
        BLOCK_E=power_of_two(num_experts + 1),
    )  # fmt: skip
    return token, place, offset


@place_rows.register_fake
def _(
    ordered: torch.Tensor, slot: torch.Tensor, top_k: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = slot.shape[0], slot.shape[0], num_experts + 1
    token, place, offset = (slot.new_empty(size, dtype=torch.int32) for size in sizes)
    return token, place, offset


@triton.jit
def place_rows_kernel(
    ordered_ptr,
    slot_ptr,
    token_ptr,
    place_ptr,
    offset_ptr,
    S,
    K,
    E,
    halvings,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """token[s] = slot[s] // K; place[slot[s]] = s, or -1 from expert E on; the first program looks offsets up."""
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_ptr + s, mask=s < S, other=0)
    expert = tl.load(ordered_ptr + s, mask=s < S, other=0)
    tl.store(token_ptr + s, (slot // K).to(tl.int32), mask=s < S)
    tl.store(place_ptr + slot, tl.where(expert < E, s, -1), mask=s < S)
    if tl.program_id(0) == 0:
        wanted = tl.arange(0, BLOCK_E)
        low = tl.zeros((BLOCK_E,), dtype=tl.int32)
        high = low + S
        for _ in range(halvings):
            middle = (low + high) // 2
            is_open = low < high
            is_before = tl.load(ordered_ptr + middle, mask=is_open, other=0) < wanted
            low = tl.where(is_open & is_before, middle + 1, low)
            high = tl.where(is_open & (is_before == 0), middle, high)
        tl.store(offset_ptr + wanted, low, mask=wanted <= E)
