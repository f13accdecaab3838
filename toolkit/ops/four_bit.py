"""Four bits a weight for expert stacks: the one place that knows how they are stored.

A stack [E, O, I] lies turned round, [E, I/2, O] bytes: byte (j, o) holds input j in its low nibble and input j + I/2 in
its high one. So a run of bytes unpacks into two runs of inputs, and what belongs to one group of inputs is whole rows.
What is beside the bytes says what the codes mean:

    int4     w = q · step · scale, q in [-8, 7]; step int8 [E, I/G, O], |step| ≤ 15; scale fp32 [E, O]
    mxfp4    w = E2M1[code] · 2^(scale − 127), scale uint8 [E, I/32, O], as gpt-oss is published
    grouped  w = (code − 8) · scale, scale [E, I/G, O] in fp16, bf16 or fp32, as GPTQ and compressed-tensors store it

int4 is ours: q · step is a whole number of at most 120, so that such a weight is an int8 one with a scale a row, stored
in half. Every int8 product takes it, exactly, after a multiplication of small integers.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.parts import E2M1, FOUR_BIT_GROUP

__all__ = [
    "FourBits",
    "dequantize",
    "group_of",
    "integers",
    "kind_of",
    "outputs_of",
    "packed_codes",
    "quantize_int4",
    "quantize_mxfp4",
    "rows_into",
    "turned",
]

_MOST_STEPS = 15
_LARGEST_CODE = 8
_SHRINKS = (1.04, 1.0, 0.95, 0.9, 0.85, 0.8)
"""Of the step that reaches a group's largest weight: a smaller one clips it and is finer for the others."""
_HALF_BIAS = 14
"""E2M1's bits, read as fp16's, are worth this many powers of two less."""


class FourBits(NamedTuple):
    """A matrix [I/2, O], or a stack of them; `step` for int4 alone."""

    packed: Tensor
    scale: Tensor
    step: Tensor | None = None


def kind_of(weight: Tensor, scale: Tensor | None, step: Tensor | None) -> str | None:
    """`int4`, `mxfp4` or `grouped` by what a stack is stored in; None for one that is not of four bits."""
    if scale is None or weight.dtype != torch.uint8:
        return None
    if step is not None:
        return "int4"
    return "mxfp4" if scale.dtype == torch.uint8 else "grouped"


def turned(codes: Tensor) -> Tensor:
    """Codes of 0 to 15, uint8 [..., O, I], as they are stored: [..., I/2, O]."""
    low, high = codes.transpose(-1, -2).chunk(2, -2)
    return low.contiguous() | (high << 4)


def packed_codes(codes: Tensor) -> Tensor:
    """Codes of −8 to 7, [..., O, I], as they are stored."""
    return turned(codes.to(torch.int8).bitwise_and_(15).view(torch.uint8))


def dequantize(stored: FourBits) -> Tensor:
    """The fp32 weight [..., O, I]."""
    packed, scale, step = stored
    if step is not None:
        return (integers(stored).float() * scale.unsqueeze(-2)).transpose(-1, -2)
    whole = _room_for(packed, torch.float32)
    low, high = whole.chunk(2, -2)
    float_into(low, high, packed, *scale.chunk(2, -2))
    return whole.transpose(-1, -2)


def _room_for(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty [..., I, O] for bytes [..., I/2, O]."""
    return torch.empty((*packed.shape[:-2], 2 * packed.shape[-2], packed.shape[-1]), dtype=dtype, device=packed.device)


def group_of(stored: FourBits) -> int:
    """Inputs that share a step or a scale."""
    beside = stored.scale if stored.step is None else stored.step
    return 2 * stored.packed.shape[-2] // beside.shape[-2]


def outputs_of(stored: FourBits, outputs: slice) -> FourBits:
    """Some outputs of a matrix; nothing is copied."""
    packed, scale, step = stored
    return FourBits(packed[:, outputs], scale[..., outputs], None if step is None else step[:, outputs])


def integers(stored: FourBits, *, out: Tensor | None = None) -> Tensor:
    """int4 as int8 [..., I, O], without the rows' scale."""
    packed, _, step = stored
    assert step is not None
    whole = _room_for(packed, torch.int8) if out is None else out
    (low, high), (low_step, high_step) = whole.chunk(2, -2), step.chunk(2, -2)
    expand_into(low, high, packed, low_step, high_step)
    return whole


def rows_into(low: Tensor, high: Tensor, stored: FourBits, start: int, stop: int) -> None:
    """Bytes `start` to `stop` of a matrix as two runs of rows [n, O]: int4 without the rows' scale, others whole."""
    packed, group = stored.packed[start:stop], group_of(stored)
    beside = stored.scale if stored.step is None else stored.step
    first, last, half = start // group, stop // group, beside.shape[0] // 2
    sides = beside[first:last], beside[half + first : half + last]
    if stored.step is None:
        float_into(low, high, packed, *sides)
        return
    codes = torch.empty((2, *packed.shape), dtype=torch.int8, device=packed.device)
    expand_into(codes[0], codes[1], packed, *sides)
    low.copy_(codes[0])
    high.copy_(codes[1])


def expand_into(low: Tensor, high: Tensor, packed: Tensor, low_step: Tensor, high_step: Tensor) -> None:
    """int4 as int8, without the row's scale: both [..., n, O] of bytes [..., n, O] and steps [..., n/G, O]."""
    signed = packed.view(torch.int8)
    torch.bitwise_left_shift(signed, 4, out=low)
    torch.bitwise_right_shift(low, 4, out=low)
    torch.bitwise_right_shift(signed, 4, out=high)
    for half, step in ((low, low_step), (high, high_step)):
        grouped = half.unflatten(-2, (step.shape[-2], -1))
        torch.mul(grouped, step.unsqueeze(-2), out=grouped)


def float_into(low: Tensor, high: Tensor, packed: Tensor, low_scale: Tensor, high_scale: Tensor) -> None:
    """mxfp4 or grouped, multiplied out: both float [..., n, O] of bytes [..., n, O] and scales [..., n/G, O]."""
    is_mx = low_scale.dtype == torch.uint8
    bits = packed.to(torch.int16) if is_mx else packed
    for half, place, scale in ((low, 0, low_scale), (high, 4, high_scale)):
        if is_mx:
            sign = bits.bitwise_and(8 << place).bitwise_left_shift_(12 - place)
            size = bits.bitwise_and(7 << place).bitwise_left_shift_(9 - place)
            half.copy_(size.bitwise_or_(sign).view(torch.float16))
            factor = torch.exp2(scale.float() - 127) * 2.0**_HALF_BIAS
        else:
            half.copy_(bits >> 4 if place else bits & 15).sub_(_LARGEST_CODE)
            factor = scale.float()
        grouped = half.unflatten(-2, (scale.shape[-2], -1))
        if torch.promote_types(scale.dtype, half.dtype) == half.dtype and (not is_mx or half.dtype != torch.float16):
            grouped.mul_(factor.to(half.dtype).unsqueeze(-2))
        else:  # the scale itself would be rounded, always in the same direction for its group, or be infinite
            grouped.copy_(grouped.float().mul_(factor.unsqueeze(-2)))


@torch.no_grad()
def quantize_int4(weight: Tensor, group: int = FOUR_BIT_GROUP, importance: Tensor | None = None) -> FourBits:
    """Round a float matrix [O, I] to int4: of a few steps for each group the one that errs least.

    Args:
        importance: [I], what a squared error of each input counts; all the same by default.
    """
    grouped = weight.float().unflatten(-1, (-1, group))  # [O, I/G, G]
    scale = grouped.abs().amax((-1, -2)) / (_LARGEST_CODE * _MOST_STEPS)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    grouped = grouped / scale[:, None, None]
    largest = grouped.abs().amax(-1)
    counts = None if importance is None else importance.float().unflatten(-1, (-1, group))
    # The code −8 has no counterpart: the step's sign gives it to the group's largest weight.
    sign = torch.where(grouped.amax(-1) == largest, -1.0, 1.0)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in _SHRINKS:
        step = (largest * (shrink / _LARGEST_CODE)).round_().clamp_(1, _MOST_STEPS).mul_(sign)
        codes = (grouped / step[..., None]).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE - 1)
        squared = (grouped - codes * step[..., None]).square_()
        error = (squared if counts is None else squared.mul_(counts)).sum(-1)
        best = (error, step, codes) if best is None else _better(best, (error, step, codes))
    assert best is not None
    _, step, codes = best
    return FourBits(packed_codes(codes.flatten(-2)), scale, step.t().to(torch.int8).contiguous())


@torch.no_grad()
def quantize_mxfp4(weight: Tensor) -> FourBits:
    """Round a float matrix [O, I] to MXFP4: of two powers of two for each group the one that errs least."""
    grouped = weight.float().unflatten(-1, (-1, FOUR_BIT_GROUP))
    largest = grouped.abs().amax(-1)
    power = torch.floor(torch.log2(largest.clamp_min(2.0**-100) / E2M1[-1])).clamp_(-126, 126)
    grouped = grouped * torch.exp2(-power)[..., None]
    values = torch.tensor((*E2M1, *(-value for value in E2M1)), device=weight.device)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shift in (0, 1):
        codes = nearest_e2m1(grouped / 2**shift)
        error = (grouped - values[codes.long()] * 2**shift).square_().sum(-1)
        found = error, power + shift, codes
        best = found if best is None else _better(best, found)
    assert best is not None
    _, exponent, codes = best
    return FourBits(turned(codes.flatten(-2)), (exponent + 127).t().to(torch.uint8).contiguous())


def _better(best: tuple[Tensor, Tensor, Tensor], found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each group what errs less: error [O, I/G], step or exponent [O, I/G], codes [O, I/G, G]."""
    is_less = found[0] < best[0]
    error, unit = (new.where(is_less, old) for new, old in zip(found[:2], best[:2], strict=True))
    return error, unit, found[2].where(is_less[..., None], best[2])


def nearest_e2m1(values: Tensor) -> Tensor:
    """The code of the nearest FP4 value, uint8; what lies between two goes to the even code."""
    bounds = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E2M1)], device=values.device)
    size = values.abs().contiguous()
    below, above = torch.bucketize(size, bounds, right=False), torch.bucketize(size, bounds, right=True)
    code = torch.where(below % 2 == 0, below, above)
    return (code + 8 * (values < 0)).to(torch.uint8)
