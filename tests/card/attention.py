"""What CUDA's attention kernels compute, in plain torch on a CPU: outputs and row sums, and the gradients.

B batch, H heads, h heads of keys and values, L queries, M keys, d width
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from tests.card.library import RehearsalError

__all__ = ["ATTENTION"]

_WINDOW = ("window_size_left", "window_size_right")


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, L, M] in fp32, rows that attend to nothing are zero; and the logarithms of the rows' sums."""
    scores = q.float() @ k.float().transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    return scores.softmax(-1).nan_to_num(0.0), scores.logsumexp(-1)


def _no_dropout(p: float) -> None:
    if p:
        raise RehearsalError("dropout inside an attention kernel is not rehearsed")


def _gradients(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Of q, k, v and the bias."""
    P, _ = _probabilities(q, k, bias, causal, scale)
    grad = grad.float()
    of_P = grad @ v.float().transpose(-1, -2)
    of_scores = P * (of_P - (of_P * P).sum(-1, keepdim=True))
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    of_q, of_k = of_scores @ k.float() * factor, of_scores.transpose(-1, -2) @ q.float() * factor
    return of_q.to(q.dtype), of_k.to(k.dtype), (P.transpose(-1, -2) @ grad).to(v.dtype), of_scores


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, needs_sums: bool, p: float = 0.0,
    causal: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    _no_dropout(p)
    P, sums = _probabilities(q, k, bias, causal, scale)
    room = -(-q.shape[2] // 32) * 32 if needs_sums else 0  # the kernel's rows come in 32s
    padded = torch.full((*sums.shape[:2], room), math.inf)
    padded[..., : sums.shape[-1] if room else 0] = sums if room else 0
    return (P @ v.float()).to(q.dtype), padded, None, None


def _efficient_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
    sums: torch.Tensor, seed: Any, offset: Any, p: float, wanted: Any, causal: bool = False, *,
    scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    _no_dropout(p)
    of_q, of_k, of_v, of_bias = _gradients(grad, q, k, v, bias, causal, scale)
    return of_q, of_k, of_v, of_bias if wanted[3] else None


def _repeated(q: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    return [other.repeat_interleave(q.shape[1] // other.shape[1], 1) for other in others]


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float = 0.0, causal: bool = False, debug: bool = False, *,
    scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    _no_dropout(p)
    k, v = _repeated(q, k, v)
    P, sums = _probabilities(q, k, None, causal, scale)
    return (P @ v.float()).to(q.dtype), sums, *(None,) * 7


def _flash_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sums: torch.Tensor,
    cum_q: Any, cum_k: Any, max_q: Any, max_k: Any, p: float, causal: bool, seed: Any, offset: Any, *,
    scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    _no_dropout(p)
    of_q, of_k, of_v, _ = _gradients(grad, q, *_repeated(q, k, v), None, causal, scale)
    groups = q.shape[1] // k.shape[1]
    return of_q, *(each.unflatten(1, (-1, groups)).sum(2) for each in (of_k, of_v))


def _documents(
    tensors: tuple[torch.Tensor, ...], bounds: tuple[torch.Tensor, torch.Tensor], causal: bool, options: dict[str, Any]
) -> Iterator[tuple[slice, slice, list[torch.Tensor], torch.Tensor]]:
    """Rows of queries and of keys of each document, its query, key and value [1, H, ., d], and what is added to scores.

    tensors: query [T, H, d], key and value [T, h, d]. bounds: cumulative lengths of queries and of keys.
    """
    if unknown := {name for name in options if options[name] is not None} - {"scale", *_WINDOW}:
        raise RehearsalError(f"variable-length attention with {', '.join(sorted(unknown))} is not rehearsed")
    left, right = (-1 if options.get(name) is None else options[name] for name in _WINDOW)
    right = 0 if causal else right
    for (q0, q1), (k0, k1) in zip(*(pairwise(each.tolist()) for each in bounds), strict=True):
        rows, columns = slice(q0, q1), slice(k0, k1)
        q = tensors[0][rows].transpose(0, 1)[None]
        k, v = _repeated(q, *(each[columns].transpose(0, 1)[None] for each in tensors[1:]))
        distance = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None] - (k1 - k0 - q1 + q0)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        hidden |= distance > right if right >= 0 else False
        hidden |= distance < -left if left >= 0 else False
        yield rows, columns, [q, k, v], torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)


def _together(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cum_q: torch.Tensor, cum_k: torch.Tensor, max_q: int, max_k: int,
    p: float, causal: bool, debug: bool = False, **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    _no_dropout(p)
    out, sums = torch.zeros(q.shape, dtype=q.dtype), torch.zeros(q.shape[1], q.shape[0])
    for rows, _, (one_q, one_k, one_v), bias in _documents((q, k, v), (cum_q, cum_k), causal, options):
        P, logarithms = _probabilities(one_q, one_k, bias, False, options.get("scale"))
        out[rows] = (P @ one_v.float())[0].transpose(0, 1).to(q.dtype)
        sums[:, rows] = logarithms[0]
    return out, sums, None, None, None


def _together_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sums: torch.Tensor,
    cum_q: torch.Tensor, cum_k: torch.Tensor, max_q: int, max_k: int, p: float, causal: bool, seed: Any, unused: Any,
    **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    _no_dropout(p)
    of_q, of_k, of_v = (torch.zeros(each.shape, dtype=each.dtype) for each in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    for rows, columns, one, bias in _documents((q, k, v), (cum_q, cum_k), causal, options):
        grads = _gradients(grad[rows].transpose(0, 1)[None], *one, bias, False, options.get("scale"))[:3]
        of_q[rows] = grads[0][0].transpose(0, 1)
        for target, each in zip((of_k, of_v), grads[1:], strict=True):
            target[columns] = each[0].unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return of_q, of_k, of_v


def _refused(*args: Any, **kwargs: Any) -> Any:
    raise RehearsalError("attention by cuDNN is not rehearsed; no card of ours would take it")


ATTENTION = {
    "aten::_scaled_dot_product_efficient_attention": _efficient,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten::_scaled_dot_product_flash_attention": _flash,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_flash_attention_forward": _together,
    "aten::_flash_attention_backward": _together_backward,
    "aten::_cudnn_attention_forward": _refused,
    "aten::_scaled_dot_product_cudnn_attention": _refused,
}
"""By the operator's name; None in a result is a part that nothing reads."""
