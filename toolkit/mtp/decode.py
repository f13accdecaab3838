"""Decoding with drafts that are checked: the text is that of plain decoding, or drawn from the same distribution.

transformers' assisted decoding takes whatever a pass over several tokens says is likeliest. Such a pass rounds
otherwise than one over a single token, so where two words are nearly as likely it may write another text than plain
decoding does. Here a choice that rounding could turn is made again the plain way.

Source of the acceptance rule: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", alg. 1.

    k drafts, V vocabulary, H hidden
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

from toolkit.architecture import cache_name, keeps_running_state
from toolkit.errors import ModelError
from toolkit.mtp.head import capture_hidden

__all__ = ["Counts", "Draft", "Drafter", "Drawing", "Speculator", "can_speculate"]

_MARGIN = 256.0
"""A gap between the two best logits below this many units of rounding (of the largest logit) is decided the plain way.
Measured: passes over 1 and over 4 tokens differ by at most 20 units, in fp32, on three models."""

_TRIAL = 8
"""Rounds that are timed before drafting is judged."""


Pick = Callable[[list[int], torch.Tensor], tuple[int, torch.Tensor | None]]
"""Chooses a token after some tokens from logits [V], and tells the distribution it was drawn from (None: certain)."""


@dataclass(frozen=True)
class Draft:
    """Proposed tokens, and what each was drawn from: probabilities [V], or None where there was no choice."""

    tokens: list[int]
    shares: list[torch.Tensor | None]


class Drafter(Protocol):
    """Proposes up to `count` tokens."""

    def draft(self, hidden_mH: torch.Tensor, tokens: list[int], count: int, pick: Pick) -> Draft:
        """Go on after `tokens`; hidden_mH are the model's hidden states of those it has not given before."""
        ...


@dataclass
class Counts:
    """What drafting has brought.

    Passes of the model that checked drafts and the tokens they gave; by place, how many drafts were proposed and how
    many accepted; seconds and tokens of plain and of drafted rounds; near ties decided again.
    """

    passes: int = 0
    tokens: int = 0
    proposed: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, int] = field(default_factory=dict)
    plain_seconds: float = 0.0
    plain_tokens: int = 0
    drafted_seconds: float = 0.0
    replayed: int = 0
    switched_off: bool = False

    @property
    def tokens_per_pass(self) -> float:
        """Accepted tokens and the one that every pass gives anyway, per pass."""
        return self.tokens / self.passes if self.passes else 1.0

    def rates(self) -> dict[int, float]:
        """Share of proposed drafts accepted, by place from 1; a place counts once those before it were right."""
        return {k: self.accepted.get(k, 0) / n for k, n in sorted(self.proposed.items())}

    def gain(self) -> float | None:
        """Speed with drafts over speed without, where both were timed."""
        if not (self.plain_tokens and self.tokens and self.drafted_seconds):
            return None
        return (self.tokens / self.drafted_seconds) / (self.plain_tokens / self.plain_seconds)


def can_speculate(model: PreTrainedModel) -> str | None:
    """Why this model cannot take tokens back once it has read them, or None where it can."""
    if keeps_running_state(model):
        return "its layers keep a running state, which cannot be taken back after a rejected draft"
    return None


class Drawing:
    """How tokens are drawn, as `generate` would.

    Args:
        base: a bare model. drawn: options of sampling by `generate`'s names, None for the likeliest token.
    """

    def __init__(self, base: PreTrainedModel, max_new_tokens: int, drawn: Mapping[str, Any] | None) -> None:
        self.base, self.max_new_tokens = base, max_new_tokens
        sampling = {"do_sample": False} if drawn is None else {"do_sample": True, **drawn}
        self._config, _ = base._prepare_generation_config(None, max_new_tokens=max_new_tokens, **sampling)
        ends = self._config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else set() if ends is None else {int(ends)}

    def processors(self, prompt_length: int) -> LogitsProcessorList:
        """What the generation config does to logits: temperature, top-k, penalties, as transformers builds it."""
        self._config.max_length = prompt_length + self.max_new_tokens
        return self.base._get_logits_processor(
            self._config, input_ids_seq_length=prompt_length, device=self.base.device, logits_processor=[]
        )


class Speculator:
    """Decodes sequences one by one with drafts.

    Args:
        model: bare or adapted. make_drafter: a fresh one for every sequence. count: drafts a pass.
        temperature: 0 is greedy. measured: whether drafting is timed and switched off where it does not pay.
    """

    def __init__(
        self,
        model: Any,
        make_drafter: Callable[[], Drafter],
        *,
        count: int,
        max_new_tokens: int,
        temperature: float = 0.0,
        measured: bool = True,
        seed: int | None = None,
    ) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if reason := can_speculate(base):
            raise ModelError(f"{type(base).__name__}: {reason}; omit --mtp")
        self.model, self.base = model, base
        self.make_drafter, self.count, self.max_new_tokens = make_drafter, count, max_new_tokens
        self.is_greedy, self.measured = temperature <= 0, measured
        self.drawing = Drawing(base, max_new_tokens, None if self.is_greedy else {"temperature": temperature})
        self.ends = self.drawing.ends
        self.random = None if seed is None else torch.Generator(base.device).manual_seed(seed)
        self.counts = Counts()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], told: Callable[[list[int]], None] = lambda new: None
    ) -> list[list[int]]:
        """Token ids that follow each prompt, the end token included where one was written.

        `told` is called with the new ones of every pass.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with capture_hidden(self.base) as hidden:
                return [_Sequence(self, list(prompt), hidden).run(told) for prompt in prompts]
        finally:
            self.model.train(was_training)

    def draw(self, shares_V: torch.Tensor) -> int:
        """One token of a distribution."""
        return int(torch.multinomial(shares_V, 1, generator=self.random))

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return float(torch.rand((), generator=self.random, device=self.base.device))


class _Sequence:
    """One sequence: its tokens, the model's cache, and up to where that cache is what plain decoding would have."""

    def __init__(self, owner: Speculator, prompt: list[int], hidden: Callable[[], torch.Tensor]) -> None:
        self.owner, self.tokens, self.hidden = owner, prompt, hidden
        self.prompt = len(prompt)
        self.device = owner.base.device
        self.processors = owner.drawing.processors(self.prompt)
        self.cache = DynamicCache(config=owner.base.config.get_text_config(decoder=True))
        self.cache.activate_past_recording()
        self.drafter = owner.make_drafter()
        self.plain = self.prompt  # tokens whose keys plain decoding would have, bit for bit

    def run(self, told: Callable[[list[int]], None]) -> list[int]:
        owner, counts = self.owner, self.owner.counts
        logits = self._forward(self.tokens)
        fresh = self.hidden()[0]
        self.tokens.append(self._choose(self.tokens, logits[-1])[0])
        told(self.tokens[-1:])
        while not self._is_over():
            started = time.perf_counter()
            room = owner.max_new_tokens - (len(self.tokens) - self.prompt) - 1
            wanted = 0 if self._skips_drafts() else min(owner.count, room)
            draft = self.drafter.draft(fresh, self.tokens, wanted, self._pick) if wanted else Draft([], [])
            fresh, new = self._check(draft)
            spent = time.perf_counter() - started
            told(self.tokens[-new:])
            if draft.tokens:
                counts.passes += 1
                counts.tokens += new
                counts.drafted_seconds += spent
                self._switch_off_if_slower()
            elif not wanted:
                counts.plain_seconds += spent
                counts.plain_tokens += new
        return self.tokens[self.prompt :]

    def _skips_drafts(self) -> bool:
        """Whether this round goes without drafts: they did not pay, or the plain way has yet to be timed."""
        counts = self.owner.counts
        if counts.switched_off:
            return True
        return self.owner.measured and counts.passes >= 2 and counts.plain_tokens < _TRIAL // 2

    def _switch_off_if_slower(self) -> None:
        counts = self.owner.counts
        gain = counts.gain()
        if self.owner.measured and counts.passes >= _TRIAL and gain is not None and gain < 1.0:
            counts.switched_off = True

    def _is_over(self) -> bool:
        return self.tokens[-1] in self.owner.ends or len(self.tokens) - self.prompt >= self.owner.max_new_tokens

    def _forward(self, tokens: list[int]) -> torch.Tensor:
        """Logits [len, V] after each of `tokens`, the next ones of this sequence."""
        past = self.cache.get_seq_length()
        ids = torch.tensor([tokens], device=self.device)
        positions = torch.arange(past, past + len(tokens), device=self.device)[None]
        given = {cache_name(): self.cache, "use_cache": True}
        output = self.owner.model(input_ids=ids, position_ids=positions, **given)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _pick(self, tokens: list[int], logits_V: torch.Tensor) -> tuple[int, torch.Tensor | None]:
        return self._choose(tokens, logits_V)

    def _scores(self, tokens: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        if not self.processors:
            return logits_V
        scores: torch.Tensor = self.processors(torch.tensor([tokens], device=self.device), logits_V[None])[0]
        return scores

    def _choose(self, tokens: list[int], logits_V: torch.Tensor) -> tuple[int, torch.Tensor | None]:
        scores = self._scores(tokens, logits_V)
        if self.owner.is_greedy:
            return int(scores.argmax()), None
        shares = scores.softmax(-1)
        return self.owner.draw(shares), shares

    def _check(self, draft: Draft) -> tuple[torch.Tensor, int]:
        """Run the model over the last token and the drafts, and keep what it agrees with and one token more.

        Returns the hidden states of the tokens read for good, and how many tokens were added.
        """
        before = len(self.tokens)
        asked = [self.tokens[-1], *draft.tokens]
        logits = self._forward(asked)
        fresh = self.hidden()[0]
        follow = self._follow_greedily if self.owner.is_greedy else self._follow_by_chance
        kept, added, again = follow(draft, logits)
        if again is None:
            self.cache.crop(-(len(draft.tokens) - kept))
            fresh = fresh[: kept + 1]
        else:
            fresh = again[-(kept + 1) :]
        reads_plainly = not draft.tokens and self.plain == before - 1
        self.tokens += self._up_to_the_end(added)
        if reads_plainly:
            self.plain = before
        return fresh, len(self.tokens) - before

    def _up_to_the_end(self, added: list[int]) -> list[int]:
        places = [place for place, token in enumerate(added) if token in self.owner.ends]
        return added[: places[0] + 1] if places else added

    def _follow_greedily(self, draft: Draft, logits: torch.Tensor) -> tuple[int, list[int], torch.Tensor | None]:
        """Drafts kept, tokens added; and where a near tie made it read anew, the hidden states of that."""
        added: list[int] = []
        is_plain = not draft.tokens and self.plain == len(self.tokens) - 1
        for place in range(len(draft.tokens) + 1):
            known = [*self.tokens, *added]
            scores = self._scores(known, logits[place])
            token = int(scores.argmax())
            if not is_plain and self._is_near_tie(scores):
                return self._decide_plainly(place, added)
            added.append(token)
            accepted = place < len(draft.tokens) and draft.tokens[place] == token
            self._count(draft, place, accepted)
            if not accepted or token in self.owner.ends:
                return (place + 1 if accepted else place), added, None
        raise AssertionError("the last place has no draft to accept")

    def _is_near_tie(self, scores: torch.Tensor) -> bool:
        best = scores.topk(2).values
        unit = torch.finfo(self.owner.base.dtype).eps * scores[scores.isfinite()].abs().max()
        return bool(best[0] - best[1] <= _MARGIN * unit)

    def _decide_plainly(self, place: int, added: list[int]) -> tuple[int, list[int], torch.Tensor]:
        """Read the tokens since the last plain one again, one by one, as plain decoding reads them, and choose then."""
        known = [*self.tokens, *added]
        self.owner.counts.replayed += 1
        self.cache.crop(-(self.cache.get_seq_length() - self.plain))
        read, logits = [], torch.empty(0)
        for token in known[self.plain :]:
            logits = self._forward([token])
            read.append(self.hidden()[0])
        self.plain = len(known)
        return place, [*added, int(self._scores(known, logits[-1]).argmax())], torch.cat(read)

    def _follow_by_chance(self, draft: Draft, logits: torch.Tensor) -> tuple[int, list[int], torch.Tensor | None]:
        """A draft is kept with probability p / q; where it is not, what p has beyond q is drawn from."""
        added: list[int] = []
        for place, (token, drawn_from) in enumerate(zip(draft.tokens, draft.shares, strict=True)):
            shares = self._scores([*self.tokens, *added], logits[place]).softmax(-1)
            chance = float(shares[token]) / (1.0 if drawn_from is None else float(drawn_from[token]))
            accepted = self.owner.uniform() < chance
            self._count(draft, place, accepted)
            if not accepted:
                rest = shares.clone()
                if drawn_from is None:
                    rest[token] = 0.0
                else:
                    rest = (shares - drawn_from).clamp_(min=0.0)
                return place, [*added, self.owner.draw(rest if float(rest.sum()) > 0 else shares)], None
            added.append(token)
            if token in self.owner.ends:
                return place + 1, added, None
        return len(draft.tokens), [*added, self._choose([*self.tokens, *added], logits[-1])[0]], None

    def _count(self, draft: Draft, place: int, accepted: bool) -> None:
        if place >= len(draft.tokens):
            return
        counts = self.owner.counts
        counts.proposed[place + 1] = counts.proposed.get(place + 1, 0) + 1
        counts.accepted[place + 1] = counts.accepted.get(place + 1, 0) + int(accepted)
