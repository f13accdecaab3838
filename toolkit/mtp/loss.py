"""What a head learns from: the distribution of its own model one step later, or the token itself.

A chunk of rows at a time, loss and gradient are computed together and the logits let go: 4,096 rows of 150,000 words
would take 2.4 GB. Liger and others fuse cross-entropy like this; KL divergence to a teacher they do not.

    B sequences, L tokens in each, N rows with a target, H hidden, V vocabulary, k the depth
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.architecture import FEW_QUERIES
from toolkit.labels import IGNORED
from toolkit.mtp.head import MtpHead, Trunk, causal_mask
from toolkit.ops.sink_attention import SINKS

__all__ = ["Chain", "DepthLoss", "Rows", "Teacher", "head_loss", "rows_at_once", "weights_of_depths"]

_CHUNK_BYTES = {"cpu": 1 << 24}
"""Bytes of logits in a chunk, of which half a dozen tensors exist at once; a card takes more, to be kept busy."""
_CHUNK_OF_CARDS = 1 << 26

_NEARLY_ALL = 0.75
"""Of a sequence's rows; with more of them wanted, to pick them out costs more than it saves."""

_WHOLE = frozenset({"eager", "sdpa", SINKS, FEW_QUERIES})
"""Attention that takes a mask of a whole row."""

_DECAY = 0.8
"""Each depth counts this much of the one before: a draft is of use only if those before it were right."""


@dataclass(frozen=True)
class Rows:
    """A batch as the head sees it.

    labels_BL: IGNORED where nothing is trained. documents_BL numbers the packed documents; valid_BL is false for
    padding. lengths are those of the documents of a single packed row, for attention that takes documents one by one.
    """

    tokens_BL: torch.Tensor
    labels_BL: torch.Tensor
    positions_BL: torch.Tensor
    documents_BL: torch.Tensor
    valid_BL: torch.Tensor | None
    bounds: Mapping[str, Any]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Rows:
        """From the inputs of the model's forward, labels included; what TRL's collator makes, packed or padded."""
        tokens, labels = inputs["input_ids"], inputs["labels"]
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        starts = torch.zeros_like(positions)
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        bounds = {
            k: inputs[k] for k in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k") if k in inputs
        }
        return cls(tokens, labels, positions, starts.cumsum(1), mask, bounds)

    def targets(self, depth: int) -> torch.Tensor:
        """Rows [B, L] whose target, `depth + 1` tokens on, is trained and of the same document."""
        ahead = depth + 1
        found = torch.zeros_like(self.labels_BL, dtype=torch.bool)
        if ahead >= found.shape[1]:
            return found
        same = self.documents_BL[:, ahead:] == self.documents_BL[:, :-ahead]
        found[:, :-ahead] = same & (self.labels_BL[:, ahead:] != IGNORED)
        if self.valid_BL is not None:
            found[:, :-ahead] &= self.valid_BL[:, ahead:].bool()
        return found


@dataclass(frozen=True)
class Teacher:
    """Logits [M, V] that the model has computed already, and where: index_BL is the row of each token, -1 for none."""

    logits_MV: torch.Tensor
    index_BL: torch.Tensor


@dataclass(frozen=True)
class DepthLoss:
    """Loss and, of its targets, how many the head's first choice agrees with the model's (KL) or the token (CE)."""

    total: float
    hits: int
    count: int


def rows_at_once(trunk: Trunk) -> int:
    """Rows whose logits exist at the same time."""
    chunk_bytes = _CHUNK_BYTES.get(trunk.weight.device.type, _CHUNK_OF_CARDS)
    return max(1, chunk_bytes // (4 * trunk.weight.shape[0]))


def weights_of_depths(depth: int) -> list[float]:
    """Falling weights that sum to one."""
    raw = [_DECAY**k for k in range(depth)]
    return [weight / sum(raw) for weight in raw]


def head_loss(
    head: MtpHead,
    trunk: Trunk,
    hidden_BLH: torch.Tensor,
    rows: Rows,
    *,
    depth: int,
    kind: str,
    teacher: Teacher | None = None,
    teacher_hidden_BLH: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[DepthLoss]]:
    """Sum over targets of the losses of all depths, weighted; and each depth's figures.

    A depth beyond the head's layers applies the last one to its own output. As in decoding, it then sees the keys of
    true hidden states before its row, and those of its own chain.

    Args:
        hidden_BLH: of the model after its final norm; gradients flow into it where it wants them.
        kind: kl; ce; or both, the KL to what lies halfway between the model's distribution and its likeliest token.
        teacher: logits at hand, instead of computing them from `teacher_hidden_BLH`.
    """
    known = (hidden_BLH if teacher_hidden_BLH is None else teacher_hidden_BLH).detach()
    chain = Chain(head, trunk, rows, depth)
    current, total, figures = hidden_BLH, hidden_BLH.new_zeros(()), []
    for step, weight in enumerate(weights_of_depths(depth), 1):
        current = chain.step(step, current)
        wanted = rows.targets(step)
        places = wanted.nonzero()
        batch, row = places[:, 0], places[:, 1]
        guide = _Guide(kind, trunk, rows.tokens_BL[batch, row + step + 1], known, teacher, batch, row + step)
        loss, hits = _GuidedLoss.apply(current[batch, row], trunk, guide)
        total = total + weight * loss
        figures.append(DepthLoss(float(loss.detach()), int(hits), len(places)))
    return total, figures


class Chain:
    """The head's blocks over a whole batch, depth after depth.

    A head of one layer computes no more of a row without a target than its keys: nobody looks at the rest.
    """

    def __init__(self, head: MtpHead, trunk: Trunk, rows: Rows, depth: int) -> None:
        self.head, self.trunk, self.rows = head, trunk, rows
        self.recurs = depth > len(head.layers)
        # What repeats a layer needs a mask of its own kind, which attention by documents does not take.
        if self.recurs and head.config._attn_implementation not in _WHOLE:
            head.follow_attention("sdpa")
        apart = head.config._attn_implementation not in _WHOLE and "cu_seq_lens_q" in rows.bounds
        self.kwargs = dict(rows.bounds) if apart and trunk.window is None else {}
        self.additive = torch.float32 if head.config._attn_implementation == "eager" else None
        self.mask = None if self.kwargs else self._mask()
        self.cache: Any = None
        one = len(head.layers) == 1
        self.further = _further(rows, depth) if one and depth > 1 else None
        self.wanted = _wanted(rows, range(1, depth + 1)) if one else None

    def _mask(self) -> torch.Tensor:
        rows = self.rows
        return causal_mask(rows.documents_BL, rows.valid_BL, self.trunk.window, additive=self.additive)

    def step(self, depth: int, hidden: torch.Tensor) -> torch.Tensor:
        """The head's hidden states [B, L, H] at `depth`, of those before it; depths come one after the other from 1."""
        tokens = self.rows.tokens_BL.roll(-depth, 1)
        positions = self.rows.positions_BL + depth
        again = depth - len(self.head.layers)
        if self.recurs and again >= 0:
            self.cache = _Keys() if self.cache is None else self.cache
        mask = self._chained(again) if again > 0 else self.mask
        if again <= 0 or self.further is None:
            wanted = self.wanted if depth == 1 else None
            return self.head.step(
                self.trunk, depth, hidden, tokens, positions, mask, self.cache, wanted=wanted, **self.kwargs
            )
        places = self.further
        wide = places[..., None].expand(-1, -1, hidden.shape[-1])
        found = self.head.step(
            self.trunk,
            depth,
            hidden.gather(1, wide),
            tokens.gather(1, places),
            positions.gather(1, places),
            mask,
            self.cache,
        )
        return hidden.new_zeros(hidden.shape).to(found.dtype).scatter(1, wide, found)

    def _chained(self, again: int) -> torch.Tensor:
        """Every true key before the row, and of each repetition the row's own."""
        assert self.mask is not None
        mask = self.mask
        if self.further is not None:
            mask = mask.gather(2, self.further[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
        own = torch.eye(mask.shape[2], dtype=torch.bool, device=mask.device)
        if self.additive is not None:
            own = torch.zeros(own.shape, device=own.device).masked_fill(~own, torch.finfo(self.additive).min)
        return torch.cat([mask, *[own.expand(*mask.shape[:3], -1)] * again], dim=-1)


def _wanted(rows: Rows, depths: range) -> torch.Tensor | None:
    """Rows [B, L] that have a target at one of these depths; None where that is nearly all of them."""
    found = torch.stack([rows.targets(depth) for depth in depths]).any(0)
    return None if int(found.sum(1).max()) > _NEARLY_ALL * found.shape[1] else found


def _further(rows: Rows, depth: int) -> torch.Tensor | None:
    """The rows [B, N] that have a target at the second depth or later, filled up with the last one, which has none."""
    wanted = _wanted(rows, range(2, depth + 1))
    if wanted is None:
        return None
    length, most = wanted.shape[1], int(wanted.sum(1).max())
    places = torch.where(wanted, torch.arange(length, device=wanted.device), length - 1)
    return places.sort(1).values[:, : max(1, most)]


class _Keys:
    """Keys and values of the layer that repeats, gradients kept; as much of a `Cache` as attention calls."""

    is_compileable = False

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self, *_args: Any) -> int:
        return 0 if self.keys is None else int(self.keys.shape[-2])


@dataclass(frozen=True)
class _Guide:
    """What each row should have said: the token after it, or the model's distribution there."""

    kind: str
    trunk: Trunk
    targets_N: torch.Tensor
    hidden_BLH: torch.Tensor
    teacher: Teacher | None
    batch_N: torch.Tensor
    place_N: torch.Tensor

    def log_probabilities(self, chunk: slice) -> torch.Tensor:
        """Of the model, [rows, V] in fp32."""
        batch, place = self.batch_N[chunk], self.place_N[chunk]
        if self.teacher is not None:
            logits = self.teacher.logits_MV[self.teacher.index_BL[batch, place]]
        else:
            logits = self.trunk.logits(self.hidden_BLH[batch, place])
        return logits.float().log_softmax(-1)


class _GuidedLoss(torch.autograd.Function):
    """Sum of KL or cross-entropy over rows; both gradients are `softmax(student) - target`, times the output head."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_NH, trunk, guide = args
        step = rows_at_once(trunk)
        grad_NH = torch.empty_like(hidden_NH)
        total, hits = (
            torch.zeros((), device=hidden_NH.device),
            torch.zeros((), dtype=torch.long, device=hidden_NH.device),
        )
        for start in range(0, len(hidden_NH), step):
            chunk = slice(start, start + step)
            student = trunk.logits(hidden_NH[chunk]).float().log_softmax(-1)
            known = None if guide.kind == "ce" else guide.log_probabilities(chunk)
            target = trunk.columns(guide.targets_N[chunk]) if known is None else known.argmax(-1)
            met = student.gather(1, target[:, None])[:, 0]
            hits += (met >= student.amax(-1)).sum()
            if known is None:
                total -= met.sum()
                difference = student.exp_()
                difference[torch.arange(len(target), device=target.device), target] -= 1.0
            else:
                shares = known.exp()
                if guide.kind == "both":
                    shares.mul_(0.5)[torch.arange(len(target), device=target.device), target] += 0.5
                    known = shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
                total += (shares * (known - student)).sum()
                difference = student.exp_().sub_(shares)
            grad = difference.to(trunk.weight.dtype) @ trunk.weight
            grad_NH[chunk] = grad if trunk.scale == 1.0 else grad * trunk.scale
        ctx.save_for_backward(grad_NH)
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grads[0], None, None
