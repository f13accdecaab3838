"""Supervised fine-tuning: TRL's `SFTTrainer`, computing no more than is needed.

Packing, chunked loss, token-normalised accumulation, load-balancing loss, schedules and trackers are TRL's and
transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from trl import SFTTrainer

from toolkit.labels import IGNORED
from toolkit.ops.label_logits import (
    entropy_and_hits,
    forward_inputs,
    label_logits,
    pays_to_keep_logits,
    summed_loss,
)
from toolkit.processes import processes
from toolkit.training.adapter_steps import TOLD, AdapterSteps, RunContext
from toolkit.training.told_labels import can_score, score_labelled

__all__ = ["AdapterTrainer"]


class AdapterTrainer(AdapterSteps, SFTTrainer):  # type: ignore[misc]
    """TRL's loss; on a CPU, where TRL computes the logits of all tokens, that of the labelled ones.

    That is so on a card, too, where TRL's fused head does not compute the family's own logits, and where labels are
    smoothed: that takes all of a token's log-probabilities, and the fused head gives the label's alone.
    """

    tells_labels = True

    def __init__(self, context: RunContext, **trl: Any) -> None:
        """`trl`: what TRL's trainer takes."""
        self.label_smoothing: float = context.arguments["label_smoothing_factor"]
        super().__init__(context, **trl)

    def check_fused_head(self) -> bool:
        """As there; where labels are smoothed it is not used in any case."""
        found = super().check_fused_head()
        if self.label_smoothing:
            self.trusts_fused_head = False
            self.aux_loss_enabled &= self.gives_balance
        return found

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As there, by cross entropy whatever is trained on."""
        kind, self.args.loss_type = self.args.loss_type, "nll"
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.args.loss_type = kind

    def _own_loss(self, model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor | None:
        if not self.trusts_fused_head or self._pays_to_keep_logits(inputs["labels"]):
            return self._labelled_loss(model, inputs, **kwargs)
        if self.model.training and self._would_wait(inputs["labels"]):
            return self._fused_loss(model, inputs, **kwargs)
        return None

    def _pays_to_keep_logits(self, labels: torch.Tensor) -> bool:
        """TRL's way needs less memory where many positions are labelled, and is as fast on a card."""
        if labels.device.type != "cpu" or self.wants_trls_balance:
            return False
        positions = int((labels[:, 1:] != IGNORED).any(0).sum())
        return pays_to_keep_logits(self.model, len(labels), positions)

    def _labelled_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor | None:
        """As TRL computes it, and the same metrics; None where the family gives no load-balancing loss of its own."""
        given = forward_inputs(inputs, balanced=self.aux_loss_enabled)
        logits, targets, outputs = label_logits(model, given, inputs["labels"])
        self._logits = None if self.beside is None else logits.detach()
        balance = getattr(outputs, "aux_loss", None)
        if self.aux_loss_enabled and balance is None:
            self.wants_trls_balance = True
            return None
        metrics = self._metrics["train" if self.model.training else "eval"]
        count = torch.as_tensor(len(targets) if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        smoothing = self.label_smoothing if self.model.training else 0.0
        loss = summed_loss(logits, targets, label_smoothing=smoothing, dft=self._weighs()) / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if balance is not None and self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * balance / steps
            metrics["aux_loss"].append(float(self.accelerator.gather_for_metrics(balance.detach()).mean()))
        self._count_hits(logits.detach(), targets, metrics)
        return loss

    def _fused_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As TRL computes it with its fused head, and the same metrics, which stay on the card until logged."""
        balanced, gather = self.aux_loss_enabled, self.accelerator.gather_for_metrics
        told = getattr(inputs["labels"], TOLD, None)
        if told is None or processes() > 1 or not can_score(self.model, balanced=balanced):
            given = {**forward_inputs(inputs, balanced=balanced), "labels": inputs["labels"], "fused_lm_head": True}
            outputs = model(**given)
            found = outputs.label_mask.sum()
        else:
            with self.accelerator.autocast():
                outputs = score_labelled(self.model, inputs, told, balanced=balanced)
            found = torch.full((), told.shape[1], device=told.device)
        weights = outputs.log_probs.exp().detach() if self._weighs() else 1.0
        loss: torch.Tensor = -(weights * outputs.log_probs).sum() / torch.as_tensor(
            found if num_items_in_batch is None else num_items_in_batch
        ).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        metrics = self._metrics["train"]
        if balanced:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
            metrics["aux_loss"].append(gather(outputs.aux_loss.detach()).mean())
        count = gather(found).sum().clamp(min=1)
        metrics["entropy"].append(gather(outputs.entropy.detach().sum()).sum() / count)
        metrics["mean_token_accuracy"].append(gather(outputs.is_top1.sum()).sum() / count)
        return loss

    def _weighs(self) -> bool:
        """Whether each token's loss is weighed by its probability, as `loss_type: dft` says."""
        return bool(self.args.loss_type == "dft")

    def _count_hits(self, logits: torch.Tensor, targets: torch.Tensor, metrics: dict[str, list[float]]) -> None:
        entropy, hits = entropy_and_hits(logits, targets)
        count = torch.full_like(entropy, float(len(targets)))
        sums = torch.stack([entropy, hits.to(entropy.dtype), count])
        entropies, right, counted = self.accelerator.gather_for_metrics(sums.unsqueeze(0)).sum(0).tolist()
        metrics["entropy"].append(entropies / max(1.0, counted))
        metrics["mean_token_accuracy"].append(right / max(1.0, counted))
