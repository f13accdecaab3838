"""How many drafts of a head a model would accept, found from its finished greedy text in a few passes.

Decoding with drafts runs one token or a few at a time, which on a CPU is a thousand times slower than reading. A text
that is known already tells what decoding would have done: at each place the head's guesses, computed for all places at
once as in training, are compared with the words that follow. `tests/parity/test_mtp_replay.py` holds both together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel

from toolkit.mtp.head import MtpHead, Trunk, capture_hidden
from toolkit.mtp.loss import Chain, Rows

__all__ = ["Replay", "Texts"]


@dataclass(frozen=True)
class Replay:
    """Tokens a checked pass gives (tau), and the share of drafts accepted by place, those before being right."""

    passes: int
    tokens: int
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def tau(self) -> float:
        """1 where no draft is ever right."""
        return self.tokens / max(1, self.passes)

    @property
    def rates(self) -> list[float]:
        """Accepted over proposed, by place."""
        return [a / max(1, p) for a, p in zip(self.accepted, self.proposed, strict=True)]


class Texts:
    """A model's own greedy answers to prompts, read once; heads are tried on them.

    The model must stay as it is (adapter on or off) only while this is made. `limit` is how many tokens an answer may
    have: as in decoding no draft reaches beyond it, and what is left for a pass without drafts is not counted.
    """

    def __init__(
        self,
        model: PeftModel,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        limit: int,
        batch: int = 25,
    ) -> None:
        self.trunk, self.limit = Trunk.of(model.get_base_model()), limit
        self.batches: list[tuple[list[int], list[list[int]], torch.Tensor]] = []
        for start in range(0, len(prompts), batch):
            asked, said = prompts[start : start + batch], answers[start : start + batch]
            rows = [[*prompt, *answer] for prompt, answer in zip(asked, said, strict=True)]
            self.batches.append((list(map(len, asked)), rows, self._read(model, rows)))

    @staticmethod
    @torch.no_grad()
    def _read(model: PeftModel, rows: list[list[int]]) -> torch.Tensor:
        ids, mask = _padded(rows)
        with capture_hidden(model.get_base_model()) as hidden:
            model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        return hidden().float()

    @torch.no_grad()
    def replay(self, head: MtpHead, counts: Sequence[int]) -> dict[int, Replay]:
        """Decode with each of these numbers of drafts a pass."""
        head.follow_attention("sdpa")
        guesses = [self._guesses(head, *batch, max(counts)) for batch in self.batches]
        return {count: self._decode(guesses, count) for count in counts}

    def _decode(self, guesses: list[list[torch.Tensor]], count: int) -> Replay:
        passes = tokens = 0
        proposed, accepted = [0] * count, [0] * count
        for (starts, rows, _), guessed in zip(self.batches, guesses, strict=True):
            for number, (row, last) in enumerate(zip(rows, starts, strict=True)):
                end, full = len(row) - 1, last + self.limit - 1
                while last < min(end, full - 1):
                    right = 0
                    for place in range(min(count, full - last - 1, end - last)):
                        proposed[place] += 1
                        if int(guessed[place][number, last - 1]) != row[last + place + 1]:
                            break
                        accepted[place] += 1
                        right += 1
                    gained = min(right + 1, end - last)
                    passes, tokens, last = passes + 1, tokens + gained, last + gained
        return Replay(passes, tokens, tuple(proposed), tuple(accepted))

    def _guesses(
        self, head: MtpHead, starts: list[int], rows: list[list[int]], hidden: torch.Tensor, count: int
    ) -> list[torch.Tensor]:
        """By depth, the head's choice [B, L] at each place of the answers, given the true tokens before it."""
        ids, mask = _padded(rows)
        chain = Chain(head, self.trunk, Rows.of({"input_ids": ids, "labels": ids, "attention_mask": mask}), count)
        current, found = hidden, []
        for depth in range(1, count + 1):
            current = chain.step(depth, current)
            choices = torch.full(ids.shape, -1)
            for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
                place = slice(start - 1, len(row))
                choices[number, place] = self.trunk.logits(current[number, place]).argmax(-1)
            found.append(choices)
        return found


def _padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    shape = len(rows), max(map(len, rows))
    ids, mask = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
    return ids, mask
