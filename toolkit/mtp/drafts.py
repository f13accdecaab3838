"""Who proposes the next tokens, the head or the text so far, and what that is worth on held-out prompts.

transformers' `MTPCandidateGenerator` reloads a head from the base's folder at every call, drafts once a layer and in
batches of one sequence; this takes the head that is in memory and applies its last layer as often as wanted. Measured
are accepted drafts, tokens a pass and tokens a second.

    m new rows, H hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from toolkit.mtp.decode import Draft, Pick, Speculator
from toolkit.mtp.head import MtpHead, Trunk

__all__ = ["Drafting", "HeadDrafter", "LookupDrafter", "measure_drafts", "speculator"]


class LookupDrafter:
    """What followed the last words where they stood before, as transformers' prompt lookup finds it."""

    def draft(self, hidden_mH: torch.Tensor, tokens: list[int], count: int, pick: Pick) -> Draft:
        """Nothing where the last words are new."""
        finder = PromptLookupCandidateGenerator(num_output_tokens=count, max_length=len(tokens) + count + 2)
        found = finder.get_candidates(torch.tensor([tokens]))[0][0, len(tokens) :].tolist()[:count]
        return Draft(found, [None] * len(found))


class HeadDrafter:
    """The head over one sequence, with keys and values of its own.

    Layer j takes the hidden states of the layer before and the tokens j + 1 on. Rows whose tokens were drafts are taken
    out of its cache again, so that what stays was computed from the model's own hidden states and the tokens kept.
    """

    def __init__(self, head: MtpHead, trunk: Trunk) -> None:
        self.head, self.trunk = head, trunk
        self.cache = DynamicCache()
        self._done = [0] * len(head.layers)
        self._waiting: list[torch.Tensor | None] = [None] * len(head.layers)

    @torch.no_grad()
    def draft(self, hidden_mH: torch.Tensor, tokens: list[int], count: int, pick: Pick) -> Draft:
        """One token a layer, then the last layer again on its own output."""
        drafted = Draft([], [])
        self._wait(0, hidden_mH)
        last = hidden_mH
        for layer in range(len(self.head.layers)):
            last = self._true_rows(layer, tokens, drafted)
            if len(drafted.tokens) < count:
                self._choose(last[-1], tokens, drafted, pick)
        repeats = 0
        while len(drafted.tokens) < count:
            last, repeats = self._again(last[-1:], tokens, drafted), repeats + 1
            self._choose(last[-1], tokens, drafted, pick)
        if repeats:
            self.cache.layers[-1].crop(-repeats)
        return drafted

    def _wait(self, layer: int, hidden_mH: torch.Tensor) -> None:
        before = self._waiting[layer]
        self._waiting[layer] = hidden_mH if before is None else torch.cat([before, hidden_mH])

    def _true_rows(self, layer: int, tokens: list[int], drafted: Draft) -> torch.Tensor:
        """The layer over all rows it has not seen; of them, the last `layer` have drafts for tokens and are dropped."""
        hidden = self._waiting[layer]
        assert hidden is not None
        start, known = self._done[layer], [*tokens, *drafted.tokens]
        ahead = layer + 1
        count = min(len(hidden), len(known) - ahead - start)
        output = self._run(layer, hidden[:count], known[start + ahead : start + ahead + count], start + ahead)
        kept = count - layer
        if layer:
            self.cache.layers[layer].crop(-layer)
        self._done[layer] = start + kept
        self._waiting[layer] = hidden[kept:] if layer else None
        if layer + 1 < len(self.head.layers):
            # Temporary rows are handed on too and computed anew once their tokens are certain.
            self._forget(layer + 1, start)
            self._wait(layer + 1, output)
        return output

    def _forget(self, layer: int, start: int) -> None:
        """Drop what the layer is waiting with from row `start` on: it is about to be given again."""
        waiting = self._waiting[layer]
        if waiting is not None:
            self._waiting[layer] = waiting[: max(0, start - self._done[layer])]

    def _again(self, hidden_1H: torch.Tensor, tokens: list[int], drafted: Draft) -> torch.Tensor:
        place = len(tokens) + len(drafted.tokens) - 1
        return self._run(len(self.head.layers) - 1, hidden_1H, drafted.tokens[-1:], place)

    def _run(self, layer: int, hidden_mH: torch.Tensor, tokens: list[int], position: int) -> torch.Tensor:
        device, new = hidden_mH.device, len(tokens)
        past = self.cache.layers[layer].get_seq_length() if layer < len(self.cache.layers) else 0
        positions = torch.arange(position, position + new, device=device)[None]
        ids = torch.tensor([tokens], device=device)
        mask = _mask(new, past, self.trunk.window, hidden_mH, eager=self.head.config._attn_implementation == "eager")
        hidden = hidden_mH[None].to(self.head.layers[0].eh_proj.weight.dtype)  # type: ignore[union-attr, arg-type]
        return self.head.step(self.trunk, layer + 1, hidden, ids, positions, mask, self.cache)[0]

    def _choose(self, hidden_H: torch.Tensor, tokens: list[int], drafted: Draft, pick: Pick) -> None:
        token, shares = pick([*tokens, *drafted.tokens], self.trunk.logits(hidden_H).float())
        drafted.tokens.append(token)
        drafted.shares.append(shares)


def _mask(new: int, past: int, window: int | None, like: torch.Tensor, *, eager: bool) -> torch.Tensor | None:
    if new == 1 and (window is None or past < window):
        return None
    back = torch.arange(past, past + new, device=like.device)[:, None] - torch.arange(past + new, device=like.device)
    seen = (back >= 0) & (back < window if window else True)
    if not eager:
        return seen[None, None]
    return torch.zeros(seen.shape, device=like.device).masked_fill(~seen, torch.finfo(like.dtype).min)[None, None]


@dataclass(frozen=True)
class Drafting:
    """Greedy decoding with drafts against plain, the same prompts.

    tau: tokens a checked pass gives, 1 where no draft is ever right. acceptance: share of drafts accepted, by place.
    speeds: tokens a second. identical: whether every text came out the same.
    """

    prompts: int
    tokens: int
    tau: float
    acceptance: dict[int, float]
    tokens_per_second: float
    plain_tokens_per_second: float
    identical: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "prompts": self.prompts,
            "tokens": self.tokens,
            "tau": round(self.tau, 4),
            "acceptance": {str(place): round(share, 4) for place, share in self.acceptance.items()},
            "tokens_per_second": round(self.tokens_per_second, 2),
            "plain_tokens_per_second": round(self.plain_tokens_per_second, 2),
            "identical": self.identical,
        }


def measure_drafts(
    model: PeftModel,
    head: MtpHead | None,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    max_new_tokens: int,
    adapted: bool = True,
) -> Drafting:
    """Decode all prompts greedily with and without drafts.

    Args:
        head: None drafts by prompt lookup. adapted: False switches the adapter off, to see a head with its own base.
    """
    with nullcontext() if adapted else model.disable_adapter():
        plain = speculator(model, head, count=0, max_new_tokens=max_new_tokens)
        expected = plain.generate(prompts)
        drafted = speculator(model, head, count=count, max_new_tokens=max_new_tokens, measured=False)
        got = drafted.generate(prompts)
    counts, before = drafted.counts, plain.counts
    return Drafting(
        prompts=len(prompts),
        tokens=sum(map(len, got)),
        tau=counts.tokens_per_pass,
        acceptance=counts.rates(),
        tokens_per_second=(counts.tokens + counts.plain_tokens)
        / max(1e-9, counts.drafted_seconds + counts.plain_seconds),
        plain_tokens_per_second=before.plain_tokens / max(1e-9, before.plain_seconds),
        identical=got == expected,
    )


def speculator(
    model: PeftModel,
    head: MtpHead | None,
    *,
    count: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    measured: bool = True,
) -> Speculator:
    """What decodes with this head's drafts, or with those of prompt lookup where there is none."""
    base = model.get_base_model()
    make: Callable[[], Any] = LookupDrafter
    if head is not None:
        head.follow_attention(base.config._attn_implementation)
        make = partial(HeadDrafter, head, Trunk.of(base))
    return Speculator(
        model, make, count=count, max_new_tokens=max_new_tokens, temperature=temperature, measured=measured
    )
