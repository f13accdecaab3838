"""ORPO and SimPO: preferences of pairs without a reference, by TRL's own loss functions.

TRL's trainers of them are experimental: they tokenise in their constructors, compute the logits of every token, take
the load-balancing loss's weight from the checkpoint alone, and have metrics of their own that no checkpoint holds. So
pairs, scores and metrics are those of DPO, and TRL gives the loss of two mean log-probabilities. One difference is
meant: ORPO's loss of the chosen answer is that of the answer; TRL trains the prompt with it.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from toolkit.labels import IGNORED
from toolkit.training.adapter_steps import RunContext
from toolkit.training.preference import Pairs, PreferenceTrainer

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

__all__ = ["ReferenceFreeTrainer"]


class ReferenceFreeTrainer(PreferenceTrainer):
    """Steps of ORPO or SimPO: the loss of a pair by the mean log-probability of each answer's tokens."""

    needs_reference = False

    def __init__(self, context: RunContext, *, train: Pairs, held_out: Pairs | None, **trl: Any) -> None:
        """`trl`: what TRL's trainer takes beside the data."""
        super().__init__(context, train=train, held_out=held_out, **trl)
        assert context.preference is not None
        self.method, options = context.preference.method, context.preference.options
        self.weight_of_chosen = 1.0 if self.method == "orpo" else options["cpo_alpha"]
        """Of the chosen answer's own loss."""
        self.of_trl = SimpleNamespace(**options, loss_type=self.method, accelerator=self.accelerator)
        """What TRL's functions read of their trainer."""

    def _loss_of_answers(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        read = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        scores = self.scores(model, read, labels, balanced=self.aux_loss_enabled)
        counted = labels[:, 1:] != IGNORED
        means = scores.log_probs.sum(1) / counted.sum(1)
        chosen, rejected = means.chunk(2)
        losses, *rewards = self._of_means(chosen, rejected)
        nll = -scores.log_probs.chunk(2)[0].sum() / counted.chunk(2)[0].sum()
        loss: torch.Tensor = losses.mean() + self.weight_of_chosen * nll
        figures = {
            "nll_loss": nll,
            "entropy": scores.entropy.sum() / counted.sum(),
            "rewards/chosen": rewards[0].mean(),
            "rewards/rejected": rewards[1].mean(),
            "rewards/accuracies": (rewards[0] > rewards[1]).float().mean(),
            "rewards/margins": (rewards[0] - rewards[1]).mean(),
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
        }
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * scores.aux_loss
            figures["aux_loss"] = scores.aux_loss
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in figures.items():
            metrics[name].append(self.accelerator.gather_for_metrics(value.detach().float()).mean().item())
        return loss

    def _of_means(
        self, chosen: torch.Tensor, rejected: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each pair TRL's loss and the rewards of both answers, [pairs] each, of mean log-probabilities [pairs]."""
        if self.method == "orpo":
            ratios, one, other, *_ = ORPOTrainer.odds_ratio_loss(self.of_trl, chosen, rejected)
            return -ratios, one, other
        losses, one, other = CPOTrainer.cpo_loss(self.of_trl, chosen, rejected)
        return losses, one, other
