"""Row-wise int8, or int4, with error feedback: rounding that knows which inputs a weight will meet (GPTQ).

Plain rounding minimises |W - Ŵ|; this minimises |X(W - Ŵ)ᵀ| for inputs X like the calibration rows, in the same
storage. Libraries that ship GPTQ quantise `nn.Linear` to their own formats; expert stacks and our storage they lack.

    B matrices at a time, O outputs, I inputs, H = XᵀX the inputs' second moments
    Frantar et al. 2023, "GPTQ", algorithm 1, arXiv:2210.17323; every row of a matrix is a problem of its own
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from toolkit.ops.four_bit import integers, quantize_int4
from toolkit.ops.int8 import quantize
from toolkit.quant.gptq.search import Effort, decode, pivot_order, scales_around

__all__ = ["Solved", "blend", "compensate", "compensate_int4", "rounded_to_int4", "row_errors"]

_LEVELS = 127.0
_BLOCK = 64
_ATTEMPTS = 6
_REFIT = 0.02


@dataclass(frozen=True)
class Solved:
    """int8 [B, O, I], scales [B, O], and each row's |X(w - ŵ)|² under the given H, [B, O], before and after.

    Of int4 the integers are code times step, with the steps [B, I/G, O] that they are multiples of.
    """

    stored: torch.Tensor
    scale: torch.Tensor
    rounded_error: torch.Tensor
    error: torch.Tensor
    step: torch.Tensor | None = None


def compensate(
    weight: torch.Tensor, hessian: torch.Tensor, damping: torch.Tensor | float = 0.01, effort: Effort | None = None
) -> Solved:
    """Round matrices to int8 with error feedback; no row ends worse than by plain rounding.

    Args:
        weight: [B, O, I] float. hessian: [B, I, I], sums of x xᵀ over the rows a matrix meets; zero where none are
            known, which gives plain rounding.
        damping: added to the diagonal of H while errors are handed on, as a share of its mean; one number or [B].
        effort: how much further to look than one pass of feedback does, `search.effort_for` this shape.

    Deterministic. A matrix whose H cannot be factored even when damped further is rounded plainly.
    """
    weight_BOI, hessian_BII = weight.float(), hessian.float()
    stored, scale = quantize(weight_BOI)
    plain = row_errors(weight_BOI, stored, scale, hessian_BII)
    best = Solved(stored, scale, plain, plain.clone())
    damping_B, order, feedback = _ordered(hessian_BII, damping)
    if feedback is None:
        return best if len(weight) == 1 else _one_by_one(partial(compensate, effort=effort), weight, hessian, damping_B)
    # The scale that just avoids clipping stays: at a smaller one a row's largest weight is off by whole levels, which
    # nothing makes good. Trying 0.95, 0.9 and 0.85 of it for every row of the embedded model changed nothing.
    level = torch.ones((), device=scale.device).expand_as(weight_BOI)
    levels = _fed_back(weight_BOI, scale, level, (-_LEVELS, _LEVELS), order, feedback)
    for candidate in (scale, _refit(weight_BOI, levels, hessian_BII, scale)):
        best = _better_rows(best, weight_BOI, levels, candidate, hessian_BII)
    return best if effort is None else _search(best, weight_BOI, hessian_BII, damping_B, effort)


def compensate_int4(weight: torch.Tensor, hessian: torch.Tensor, damping: torch.Tensor | float = 0.01) -> Solved:
    """As `compensate`, in int4: each group's step is chosen for the inputs that the weights will meet, then kept."""
    weight_BOI, hessian_BII = weight.float(), hessian.float()
    plain = rounded_to_int4(weight_BOI)
    rounded = row_errors(weight_BOI, plain.stored, plain.scale, hessian_BII)
    best = replace(plain, rounded_error=rounded, error=rounded.clone())
    damping_B, order, feedback = _ordered(hessian_BII, damping)
    if feedback is None:
        return best if len(weight) == 1 else _one_by_one(compensate_int4, weight, hessian, damping_B)
    for chosen in (plain, rounded_to_int4(weight_BOI, hessian_BII.diagonal(dim1=-2, dim2=-1))):
        assert chosen.step is not None
        group = weight.shape[-1] // chosen.step.shape[-2]
        step = chosen.step.transpose(-1, -2).float().repeat_interleave(group, -1)
        levels = _fed_back(weight_BOI, chosen.scale, step, (-8.0, 7.0), order, feedback)
        for candidate in (chosen.scale, _refit(weight_BOI, levels, hessian_BII, chosen.scale)):
            best = _better_rows(best, weight_BOI, levels, candidate, hessian_BII, chosen.step)
    return best


def _ordered(
    hessian: torch.Tensor, damping: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Damping [B], the order of inputs [B, I], and the feedback of H in that order, as `_feedback` gives it.

    Inputs with much weight first: whatever they leave over, many others can still take up.
    """
    damping_B = torch.as_tensor(damping, dtype=hessian.dtype, device=hessian.device).expand(len(hessian))
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    return damping_B, order, _feedback(_take(_take(hessian, order).transpose(-1, -2), order), damping_B)


def rounded_to_int4(weight: torch.Tensor, importance: torch.Tensor | None = None) -> Solved:
    """Matrices [B, O, I] rounded to int4, their steps chosen by errors that count as `importance` [B, I] says."""
    found = [
        quantize_int4(each, importance=None if importance is None else importance[n]) for n, each in enumerate(weight)
    ]
    stored = torch.stack([integers(each) for each in found]).transpose(-1, -2)
    scale, step = (torch.stack([getattr(each, name) for each in found]) for name in ("scale", "step"))
    return Solved(stored, scale, torch.zeros_like(scale), torch.zeros_like(scale), step)


def blend(hessian: torch.Tensor, rows: torch.Tensor, mean: torch.Tensor, strength: float) -> torch.Tensor:
    """Shrink each expert's H [B, I, I], from `rows` [B] rows, towards `mean` [I, I], the H of a typical row.

    It counts as `strength` more rows, so an expert that saw many keeps its own and one that saw none takes the mean.
    """
    return (hessian + strength * mean) / (rows.to(hessian.dtype) + strength).clamp_min(1)[:, None, None]


def row_errors(weight: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """|X(w - ŵ)|² of every row, [B, O], from H [B, I, I]."""
    difference = weight.float() - stored.float() * scale.unsqueeze(-1)
    return ((difference @ hessian) * difference).sum(-1).clamp_min(0)


def _take(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Columns of [B, N, I] in each batch's own order [B, I]."""
    return matrix.gather(-1, order.unsqueeze(-2).expand_as(matrix))


def _feedback(hessian: torch.Tensor, damping: torch.Tensor) -> torch.Tensor | None:
    """The upper U with H⁻¹ = UᵀU, [B, I, I]; None where H stays singular under damping."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    for attempt in range(_ATTEMPTS):
        # A zero H has no scale of its own; any diagonal then means that no column helps another.
        extra = torch.where(mean > 0, mean * damping[:, None] * 10**attempt, torch.ones_like(mean))
        damped = hessian + torch.diag_embed(extra.expand_as(diagonal))
        # With rows and columns reversed, H = R Rᵀ with R upper, and U is R's inverse: H itself need not be inverted.
        lower, info = torch.linalg.cholesky_ex(damped.flip(-1, -2))
        if not info.any() and bool(lower.isfinite().all()):
            upper = lower.flip(-1, -2).contiguous()
            inverse: torch.Tensor = torch.linalg.solve_triangular(upper, eye.expand_as(hessian), upper=True)
            return inverse
    return None


def _fed_back(
    weight: torch.Tensor,
    scale: torch.Tensor,
    step: torch.Tensor,
    codes: tuple[float, float],
    order: torch.Tensor,
    feedback: torch.Tensor,
) -> torch.Tensor:
    """Integers [B, O, I] as floats: codes within limits times steps [B, O, I], decided in `order` [B, I]."""
    units = _take(step * scale.unsqueeze(-1), order)
    back = order.argsort(dim=-1)
    return _take(_round_columns(_take(weight, order), units, codes, feedback), back) * step


def _round_columns(
    weight: torch.Tensor, unit: torch.Tensor, codes: tuple[float, float], feedback: torch.Tensor
) -> torch.Tensor:
    """Round column by column, handing each column's error on to those still to come: codes [B, O, I] as floats."""
    rest_BIO = weight.transpose(-1, -2).contiguous()
    result_BIO = torch.empty_like(rest_BIO)
    inputs = weight.shape[-1]
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        errors_BNO = torch.empty_like(rest_BIO[:, start:end])
        for column in range(start, end):
            value = rest_BIO[:, column]
            level = torch.round(value / unit[..., column]).clamp_(*codes)
            result_BIO[:, column] = level
            error = (value - level * unit[..., column]) / feedback[:, column, column, None]
            errors_BNO[:, column - start] = error
            if column + 1 < end:
                ahead = feedback[:, column, column + 1 : end, None]
                rest_BIO[:, column + 1 : end].baddbmm_(ahead, error.unsqueeze(-2), alpha=-1)
        if end < inputs:
            rest_BIO[:, end:].baddbmm_(feedback[:, start:end, end:].transpose(-1, -2), errors_BNO, alpha=-1)
    return result_BIO.transpose(-1, -2)


def _refit(weight: torch.Tensor, levels: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scale [B, O] that fits each row's integers best under H, ⟨q, w⟩_H / ⟨q, q⟩_H, near the one it was made for.

    An H of few rows says nothing about most directions and would allow any scale.
    """
    weighted = levels @ hessian
    fitted = (weighted * weight).sum(-1) / (weighted * levels).sum(-1)
    return torch.where(fitted.isfinite(), fitted.clamp(scale * (1 - _REFIT), scale * (1 + _REFIT)), scale)


def _better_rows(
    best: Solved,
    weight: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    hessian: torch.Tensor,
    step: torch.Tensor | None = None,
) -> Solved:
    error = row_errors(weight, levels, scale, hessian)
    better = error < best.error
    return Solved(
        torch.where(better.unsqueeze(-1), levels.to(torch.int8), best.stored),
        torch.where(better, scale, best.scale),
        best.rounded_error,
        torch.where(better, error, best.error),
        best.step if step is None or best.step is None else torch.where(better.unsqueeze(-2), step, best.step),
    )


def _search(best: Solved, weight: torch.Tensor, hessian: torch.Tensor, damping: torch.Tensor, effort: Effort) -> Solved:
    """What a search finds better, row by row; one matrix at a time, since each has an order of its own."""
    found = [
        _search_one(_one(best, index), weight[index], hessian[index], damping[index : index + 1], effort)
        for index in range(len(weight))
    ]
    return _joined(found)


def _search_one(
    best: Solved, weight: torch.Tensor, hessian: torch.Tensor, damping: torch.Tensor, effort: Effort
) -> Solved:
    plain = quantize(weight)[1]
    order = pivot_order(hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device))
    feedback = _feedback(hessian[order][:, order][None], damping)
    if feedback is None:
        return best
    scale_NO = scales_around(plain, effort)
    levels_NOI = decode(weight[:, order], scale_NO, feedback[0], effort.kept)[..., order.argsort()]
    for scale, levels in zip(scale_NO[:, None], levels_NOI[:, None], strict=True):
        for candidate in (scale, _refit(weight[None], levels, hessian[None], scale)):
            best = _better_rows(best, weight[None], levels, candidate, hessian[None])
    return best


def _one(solved: Solved, index: int) -> Solved:
    parts: dict[str, Any] = {name: getattr(solved, name) for name in Solved.__dataclass_fields__}
    mine: dict[str, Any] = {name: part if part is None else part[index : index + 1] for name, part in parts.items()}
    return Solved(**mine)


def _joined(solved: list[Solved]) -> Solved:
    parts: dict[str, Any] = {name: [getattr(one, name) for one in solved] for name in Solved.__dataclass_fields__}
    joined: dict[str, Any] = {name: None if part[0] is None else torch.cat(part) for name, part in parts.items()}
    return Solved(**joined)


def _one_by_one(
    solve: Callable[..., Solved], weight: torch.Tensor, hessian: torch.Tensor, damping: torch.Tensor
) -> Solved:
    """One matrix in the batch cannot be factored; the others must not suffer for it."""
    each = zip(weight.split(1), hessian.split(1), damping.split(1), strict=True)
    return _joined([solve(*one) for one in each])
