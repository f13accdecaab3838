"""Answers to groups of equal prompts, drawn at once: each prompt is read once, rows that end leave, a head may draft.

transformers' `generate` reads a prompt for each of its answers, goes on until the longest answer ends, and drafts for a
single sequence. Here the cache of a prompt becomes that of its answers. With drafts each row keeps those that the model
accepts, so that the answers have the distribution of plain sampling.

Source of the acceptance rule: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", alg. 1.

    U prompts, B answers that go on, W columns of the prompts, L columns of the text, k drafts, m = k + 1 tokens read
    together, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from toolkit.architecture import cache_name
from toolkit.errors import DivergedError, out_of_memory
from toolkit.mtp.batch_drafts import BatchDrafter, trunk_for
from toolkit.mtp.decode import Drawing
from toolkit.mtp.head import MtpHead, capture_hidden
from toolkit.mtp.row_cache import RowCache, shifted

__all__ = ["Sampler", "require_drawable", "why_not_shared"]

_PROBED = (5, 3)
"""Tokens of two prompts that are read together to see whether a family goes on from a shared cache as from its own."""
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits, root mean square over their spread, that rounding may make. A mistake makes about 1."""


class Sampler:
    """Draws answers; the model must be in eval mode.

    Args:
        model: bare or adapted. drawn: how `generate` samples, by its names; None for the likeliest tokens.
        pad: a token that stands for nothing. head: drafts `count` tokens a pass, where given.
    """

    def __init__(
        self,
        model: Any,
        drawn: Mapping[str, Any] | None,
        max_new_tokens: int,
        *,
        pad: int = 0,
        head: MtpHead | None = None,
        count: int = 1,
    ) -> None:
        self.model, self.pad, self.head, self.count = model, pad, head, count
        self.base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.max_new_tokens, self.is_greedy = max_new_tokens, drawn is None
        self.drawing = Drawing(self.base, max_new_tokens, drawn)
        self.proposed = self.accepted = self.checks = self.kept = 0
        self.trunk = None if head is None else trunk_for(head, self.base)

    def figures(self) -> dict[str, float]:
        """Of what was written since this was asked last: the share of drafts accepted, and tokens that a pass with
        drafts gave a row; nothing where there were none."""
        found = {"drafts/accepted": self.accepted / max(1, self.proposed), "drafts/tokens_per_pass": 1.0}
        if self.checks:
            found["drafts/tokens_per_pass"] = self.kept / self.checks
        had, self.proposed, self.accepted, self.checks, self.kept = self.proposed, 0, 0, 0, 0
        return found if had else {}

    @torch.no_grad()
    def write(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Tokens that follow each prompt, up to and with the end token where one came."""
        groups = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        with capture_hidden(self.base) as hidden:
            return _Writing(self, list(groups), hidden).run([groups[tuple(prompt)] for prompt in prompts])

    def read(
        self, rows: RowCache, ids_Bm: torch.Tensor, counts_B: torch.Tensor | None = None, **more: Any
    ) -> torch.Tensor:
        """Logits [B, m or fewer, V] after tokens, which the cache takes in."""
        valid_BC, places_Bm = rows.reading(ids_Bm.shape[1], counts_B)
        given = {"attention_mask": valid_BC, "position_ids": places_Bm, cache_name(): rows.cache, **more}
        logits: torch.Tensor = self.model(input_ids=ids_Bm, use_cache=True, **given).logits
        return logits

    def empty(self, count: int) -> RowCache:
        """A cache for so many rows."""
        cache = DynamicCache(config=self.base.config.get_text_config(decoder=True))
        if self.head is not None:
            cache.activate_past_recording()
        return RowCache(cache, count, self.base.device)

    def padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts with padding on the left [U, W], and their lengths (U,)."""
        width = max(map(len, prompts))
        ids = [[self.pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.base.device)
        return torch.tensor(ids, device=self.base.device), lengths


class _Writing:
    """The answers to some prompts while they grow."""

    def __init__(self, owner: Sampler, prompts: Sequence[Sequence[int]], hidden: Callable[[], torch.Tensor]) -> None:
        self.owner, self.hidden = owner, hidden
        self.text_BL, lengths_U = owner.padded(prompts)
        self.rows = owner.empty(len(prompts))
        self.processors = owner.drawing.processors(self.text_BL.shape[1])
        self.logits_BV = owner.read(self.rows, self.text_BL, lengths_U, logits_to_keep=1)[:, -1]
        self.drafter: BatchDrafter | None = None
        if owner.head is not None and owner.trunk is not None:
            self.drafter = BatchDrafter(owner.head, owner.trunk, owner.count)
            self.drafter.begin(hidden(), self.text_BL, lengths_U)
        self.hidden_BmH = hidden()[:, -1:]

    def run(self, groups: Sequence[int]) -> list[list[int]]:
        """The answers, each to the prompt of its number."""
        answers: list[list[int]] = [[] for _ in groups]
        waiting = list(range(len(groups)))
        self._pick(torch.tensor(groups, device=self.text_BL.device))
        added_Bm = self._draw(self.text_BL[:, :0], self.logits_BV)[0][:, None]
        counts_B = torch.ones_like(added_Bm[:, 0])
        while True:
            room = self._keep(answers, waiting, added_Bm, counts_B)
            going = [place for place, left in enumerate(room) if left]
            if not going:
                return answers
            back_B = added_Bm.shape[1] - counts_B
            self.text_BL = shifted(torch.cat([self.text_BL, added_Bm], 1), back_B, 1)[:, int(back_B.min()) :]
            if len(going) < len(waiting):
                waiting, places = [waiting[place] for place in going], torch.tensor(going, device=added_Bm.device)
                self._pick(places)
                added_Bm, counts_B = added_Bm[places], counts_B[places]
            added_Bm, counts_B = self._step(added_Bm, counts_B, max(room))

    def _pick(self, places: torch.Tensor) -> None:
        self.rows.pick(places)
        if self.drafter:
            self.drafter.pick(places)
        self.text_BL, self.hidden_BmH, self.logits_BV = (
            x[places] for x in (self.text_BL, self.hidden_BmH, self.logits_BV)
        )

    def _keep(
        self, answers: list[list[int]], waiting: Sequence[int], added_Bm: torch.Tensor, counts_B: torch.Tensor
    ) -> list[int]:
        """Put the new tokens into the answers; how many each one still may have, 0 for those that ended."""
        room = []
        for number, tokens, count in zip(waiting, added_Bm.tolist(), counts_B.tolist(), strict=True):
            answer = answers[number]
            ends = [place for place in range(count) if tokens[place] in self.owner.drawing.ends]
            answer += tokens[: ends[0] + 1 if ends else count]
            del answer[self.owner.max_new_tokens :]
            room.append(0 if ends else self.owner.max_new_tokens - len(answer))
        return room

    def _step(self, added_Bm: torch.Tensor, counts_B: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass of the model over each row's last token and its drafts: new tokens [B, m], of which (B,) count."""
        drafts_Bk, shares = added_Bm[:, :0], list[torch.Tensor]()
        if self.drafter and room > 1:
            drafts_Bk, shares = self.drafter.draft(self.hidden_BmH, added_Bm, counts_B, room - 1, self._draw)
        read_Bm = torch.cat([self.text_BL[:, -1:], drafts_Bk], 1)
        logits_BmV = self.owner.read(self.rows, read_Bm)
        self.hidden_BmH, self.logits_BV = self.hidden(), logits_BmV[:, -1]
        if not shares:
            tokens_B, _ = self._draw(drafts_Bk, self.logits_BV)
            return tokens_B[:, None], torch.ones_like(tokens_B)
        added_Bm, counts_B = self._follow(drafts_Bk, shares, logits_BmV)
        self.rows.take_back(read_Bm.shape[1] - counts_B)
        return added_Bm, counts_B

    def _follow(
        self, drafts_Bk: torch.Tensor, shares: Sequence[torch.Tensor], logits_BmV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A draft is kept with probability p / q; where it is not, what p has beyond q is drawn from."""
        accepts_B = torch.ones_like(drafts_Bk[:, 0], dtype=torch.bool)
        kept_B, rest_BV = torch.zeros_like(drafts_Bk[:, 0]), torch.empty(0)
        for place, drawn_from_BV in enumerate(shares):
            own_BV = self._shares(drafts_Bk[:, :place], logits_BmV[:, place])
            draft_B1 = drafts_Bk[:, place : place + 1]
            chance_B = (own_BV.gather(1, draft_B1) / drawn_from_BV.gather(1, draft_B1))[:, 0]
            beyond_BV = (own_BV - drawn_from_BV).clamp_(min=0.0)
            beyond_BV = torch.where(beyond_BV.sum(1, keepdim=True) > 0, beyond_BV, own_BV)
            rest_BV = beyond_BV if place == 0 else torch.where(accepts_B[:, None], beyond_BV, rest_BV)
            self.owner.proposed += int(accepts_B.sum())
            accepts_B = accepts_B & (torch.rand(chance_B.shape, device=chance_B.device) < chance_B)
            kept_B = kept_B + accepts_B
        last_BV = self._shares(drafts_Bk, logits_BmV[:, -1])
        tokens_B1 = torch.multinomial(torch.where(accepts_B[:, None], last_BV, rest_BV), 1)
        added_Bm = torch.cat([drafts_Bk, tokens_B1], 1).scatter(1, kept_B[:, None], tokens_B1)
        self.owner.accepted += int(kept_B.sum())
        self.owner.checks, self.owner.kept = self.owner.checks + len(kept_B), self.owner.kept + int((kept_B + 1).sum())
        return added_Bm, kept_B + 1

    def _shares(self, more_Bj: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """Probabilities [B, V] after the text and `more_Bj`."""
        scores_BV = self.processors(torch.cat([self.text_BL, more_Bj], 1), logits_BV.float())
        if self.owner.is_greedy:
            return torch.nn.functional.one_hot(scores_BV.argmax(-1), scores_BV.shape[-1]).float()
        shares_BV: torch.Tensor = require_drawable(scores_BV).softmax(-1)
        return shares_BV

    def _draw(self, more_Bj: torch.Tensor, logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shares_BV = self._shares(more_Bj, logits_BV)
        return torch.multinomial(shares_BV, 1)[:, 0], shares_BV


def require_drawable(scores_BV: torch.Tensor) -> torch.Tensor:
    """The scores, where they can be drawn from; torch's own refusal is a fault of the card that ends all work on it.

    Raises:
        DivergedError: one is NaN or infinitely high.
    """
    if bool(scores_BV.isnan().any() | scores_BV.isposinf().any()):
        raise DivergedError(
            "the probabilities of the next token are not finite, so no answer can be drawn; start again with a lower "
            "training.learning_rate, or with model.dtype: bfloat16 where it is float16"
        )
    return scores_BV


@torch.no_grad()
def why_not_shared(sampler: Sampler) -> str | None:
    """What this family's cache cannot do that `sampler` needs, or None: go on with several answers from one prompt's
    and, with a head, take drafts back. Seen on a few tokens, against passes without a cache.
    """
    size = int(sampler.base.get_input_embeddings().weight.shape[0])
    prompts = [[(5 + 7 * place + 3 * count) % size for place in range(count)] for count in _PROBED]
    more = [[(11 + 13 * row + 5 * place) % size for place in range(3)] for row in range(4)]
    takes_back = [0, 2, 1, 2] if sampler.head is not None else [0, 0, 0, 0]
    device = sampler.base.device
    try:
        rows, (ids_UW, lengths_U) = sampler.empty(len(prompts)), sampler.padded(prompts)
        sampler.read(rows, ids_UW, lengths_U, logits_to_keep=1)
        rows.pick(torch.tensor([0, 0, 1, 1], device=device))
        sampler.read(rows, torch.tensor(more, device=device))
        if sampler.head is not None:
            rows.take_back(torch.tensor(takes_back, device=device))
        found = sampler.read(rows, torch.tensor([[9], [9], [9], [9]], device=device))[:, -1]
        for row in (1, 2):
            read = [*prompts[row // 2], *more[row][: 3 - takes_back[row]], 9]
            plain = sampler.model(input_ids=torch.tensor([read], device=device), use_cache=False).logits[0, -1]
            off = (found[row].float() - plain.float()).square().mean().sqrt() / plain.float().std()
            if not off <= _TOLERANCE[sampler.base.dtype]:
                return f"logits after it differ by {float(off):.0%} of their spread"
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]
    if sampler.head is not None and (held := _held(rows)):
        return f"it holds {', '.join(held)} beside keys and values"
    return None


def _held(rows: RowCache) -> list[str]:
    """Tensors of a cache's layers that grow or change and are neither keys nor values."""
    names = {name for layer in rows.cache.layers for name, value in vars(layer).items() if _is_state(value)}
    return sorted(names - {"keys", "values"})


def _is_state(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_state, value.values()))
    return isinstance(value, torch.Tensor) and value.ndim > 1
