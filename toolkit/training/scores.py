"""Log-probabilities of labelled tokens for a trainer of TRL's: by the model's own logits, or by TRL's fused head.

TRL's head multiplies hidden states by the head's weights by itself. It passes over what a family's own forward does to
its logits, and on a CPU it computes those of every token; on a card it saves their memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from toolkit.architecture import shared_length
from toolkit.errors import out_of_memory
from toolkit.labels import IGNORED
from toolkit.ops.document_attention import attend_to_shared_prompts
from toolkit.ops.label_logits import padded, pays_to_keep_logits
from toolkit.ops.shared_prompts import WIDE, share_prompts
from toolkit.ops.token_scores import each_token, token_scores
from toolkit.training.adapter_steps import AdapterSteps

__all__ = ["ScoredSteps", "answers_first"]

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Root mean square of what rounding may change, as a share of the log-probabilities' spread."""
_TRIED = 4
"""Answers to each prompt, and tokens of the longest, that are tried."""
_LONGEST = 64
"""Tokens of a prompt that are tried: so that it takes less memory than a step."""


class ScoredSteps(AdapterSteps):
    """Steps whose loss asks for scores; put before a trainer of TRL's that has its fused head.

    Where sequences that follow each other have one prompt, and the model allows it, that is passed through it once.
    """

    shares = False
    """Whether the model allows it."""
    share = 1
    """Sequences that have one prompt, in `sharing`."""
    wide: int | None = None
    """Tokens above which such a row is attended to part by part, where the model's attention can."""

    def scores(self, model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor, *, balanced: bool) -> Any:
        """Each labelled token's scores, as `TokenScores` has them; TRL's fused head computes them on a card.

        It does so on a CPU too where the logits would be too many, or where the family gives no load-balancing loss;
        and nowhere if its logits are not the family's own.
        """
        return self._scores_behind_prompts(model, inputs, labels, balanced=balanced, share=self.share, wide=self.wide)

    def _scores_behind_prompts(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        labels: torch.Tensor,
        *,
        balanced: bool,
        share: int,
        wide: int | None,
    ) -> Any:
        given = inputs["input_ids"], inputs["attention_mask"], labels, share
        rows = share_prompts(*given, wide=wide) if share > 1 else None
        if rows is None:
            return self._scores(model, inputs, labels, balanced=balanced)
        found, told = self._scores(model, rows.inputs, rows.labels, balanced=balanced), labels[:, 1:] != IGNORED
        return each_token(found, lambda values: rows.of_sequences(values).masked_fill(~told, 0))

    def _scores(self, model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor, *, balanced: bool) -> Any:
        positions = int((labels[:, 1:] != IGNORED).any(0).sum()) if labels.device.type == "cpu" else 0
        pays = positions and not self.wants_trls_balance and pays_to_keep_logits(self.model, len(labels), positions)
        if pays or not self.trusts_fused_head:
            found = token_scores(model, inputs, labels, balanced=balanced, temperature=self.temperature)
            if not balanced or found.aux_loss is not None or not self.trusts_fused_head:
                return found
            self.wants_trls_balance = True
        router = {"output_router_logits": True} if balanced else {}
        return model(**inputs, **router, use_cache=False, labels=labels, fused_lm_head=True)

    def may_share(self) -> int:
        """Sequences that follow each other to the same prompt, if the model allows it."""
        return 1

    def longest_to_share(self) -> tuple[int, Sequence[Sequence[int]]]:
        """Tokens of the longest prompt with its answer, and some prompts to try it with."""
        raise NotImplementedError

    def look_for_shared_prompts(self) -> None:
        """Try whether sequences may share their prompts, in `sharing`."""
        if self.may_share() == 1 or self.beside is not None:
            return
        longest, prompts = self.longest_to_share()
        if not all(map(len, prompts)):
            return
        room = shared_length(self.model.get_base_model())
        why = "this family's layers see more than they are told to"
        if longest <= room:
            with attend_to_shared_prompts(self.model) as takes_parts:
                why = self._why_not_the_same(prompts)
                self.wide = WIDE if takes_parts and not self._why_not_the_same(prompts, wide=0) else None
        elif room:
            why = f"its layers see {room} tokens back, and the longest has {longest}"
        self.shares = not why
        found = f"once for {self.may_share()} answers, checked" if self.shares else f"again for each answer: {why}"
        self.say(f"prompts: passed through the model {found}")

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Within the block prompts are shared, where they may be."""
        if not self.shares:
            yield
            return
        with attend_to_shared_prompts(self.model):
            self.share = self.may_share()
            try:
                yield
            finally:
                self.share = 1

    @torch.no_grad()
    def _why_not_the_same(self, prompts: Sequence[Sequence[int]], wide: int | None = None) -> str:
        """What is wrong with scores of answers behind one prompt, against each with its own; empty where nothing is."""
        rows = []
        for prompt in (whole[:_LONGEST] for whole in prompts):
            for number in range(_TRIED):
                answer = [prompt[(number + step) % len(prompt)] for step in range(number + 1)]
                rows.append({"input_ids": [*prompt, *answer], "labels": [*[IGNORED] * len(prompt), *answer]})
        ids, mask, labels = padded(rows, device=self.args.device)
        given = {"input_ids": ids, "attention_mask": mask}
        self.model.eval()
        try:
            with self.accelerator.autocast():
                alone, together = (
                    self._scores_behind_prompts(self.model, given, labels, balanced=False, share=share, wide=wide)
                    for share in (1, _TRIED)
                )
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            return f"{type(error).__name__}: {error}".splitlines()[0][:100]
        told = labels[:, 1:] != IGNORED
        off = (alone.log_probs - together.log_probs)[told].square().mean().sqrt() / alone.log_probs[told].std()
        same = bool(off <= _TOLERANCE[self.model.dtype])
        return "" if same else f"their scores differ by {float(off):.0%} of their spread"


def answers_first(
    ids_BL: torch.Tensor, mask_BL: torch.Tensor, kept: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences padded on both sides, padded on the right alone; so every token has the place that it has in training.

    TRL pads prompts on the left and answers on the right, and hands over no positions.

    Args:
        ids_BL, mask_BL: prompts and answers. kept: width of the answers, the last columns.

    Returns:
        ids, mask and labels [B, W] (a label is an answer's token), and where among W - 1 predictions those of the
        answers' tokens stand [B, kept].
    """
    length = ids_BL.shape[1]
    lead_B = (mask_BL[:, : length - kept] == 0).sum(1)
    order_BL = (torch.arange(length, device=ids_BL.device) + lead_B[:, None]) % length
    ids_BL, mask_BL = ids_BL.gather(1, order_BL), mask_BL.gather(1, order_BL)
    start_B = length - kept - lead_B
    places_Bk = start_B[:, None] + torch.arange(kept, device=ids_BL.device)
    width = max(2, int(mask_BL.sum(1).max()))
    ids_BL, mask_BL = ids_BL[:, :width], mask_BL[:, :width]
    is_prompt = torch.arange(width, device=ids_BL.device) < start_B[:, None]
    labels_BL = ids_BL.masked_fill(is_prompt | (mask_BL == 0), IGNORED)
    return ids_BL, mask_BL, labels_BL, (places_Bk - 1).clamp(0, width - 2)
