"""Trains a head beside the adapter, or after it, without touching the adapter's numbers.

The head has its own optimizer, its own clipping and its own backward pass, over hidden states that carry no gradient:
the adapter's steps are the same bits with it and without. No library trains such heads beside LoRA, and TRL and
transformers train one model with one optimizer. It learns inside the trainer's steps, or after them, and is saved as a
part of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from toolkit.errors import DivergedError, ModelError
from toolkit.labels import IGNORED
from toolkit.mtp.head import MtpHead, Trunk, capture_hidden
from toolkit.mtp.loss import Rows, Teacher, head_loss
from toolkit.ops.label_logits import labels_ahead

__all__ = ["HeadResult", "HeadSteps", "HeadTraining", "learn_after"]

_STATE = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class HeadResult:
    """How the head's training went: optimizer steps, and of the last of them its loss in nats per target and, by depth,
    the share of targets that the head's first choice met."""

    steps: int
    loss: float
    agreement: tuple[float, ...]
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "agreement": dict(enumerate(self.agreement, 1))}


class HeadTraining:
    """One head's optimizer and what it has seen.

    Args:
        model: the adapted model. depth: how many tokens ahead are trained. kind: kl or ce.
        loss_weight: of the head's loss in the adapter's; 0 keeps the adapter as it would be without a head.
        learning_rate: peak; it follows the trainer's schedule.
    """

    def __init__(
        self,
        head: MtpHead,
        model: PeftModel,
        *,
        depth: int = 1,
        kind: str = "kl",
        loss_weight: float = 0.0,
        learning_rate: float = 1e-3,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.head, self.model = head, model
        self.depth, self.kind, self.loss_weight = depth, kind, loss_weight
        self.learning_rate, self.max_grad_norm = learning_rate, max_grad_norm
        self.base: PreTrainedModel = model.get_base_model()
        self.trunk = Trunk.of(self.base)
        self.parameters: dict[str, nn.Parameter] = dict(head.parts())
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.steps = 0
        self._figures: list[tuple[float, list[tuple[int, int]]]] = []
        self._last: tuple[float, tuple[float, ...]] = (float("nan"), ())

    def listen(self) -> Any:
        """A context in which the model's hidden states are seen; gives the function that returns the last ones."""
        return capture_hidden(self.base)

    @contextmanager
    def among(self, words: torch.Tensor | None) -> Iterator[None]:
        """Within the block the head learns to tell these tokens apart and no others; None leaves all of them."""
        whole = self.trunk
        self.trunk = whole if words is None else whole.narrowed(words)
        try:
            yield
        finally:
            self.trunk = whole

    def learn(
        self,
        hidden_BLH: torch.Tensor,
        inputs: Mapping[str, Any],
        count: torch.Tensor | int | None,
        logits: torch.Tensor | None = None,
        kind: str | None = None,
    ) -> torch.Tensor | None:
        """Add one batch's gradients to the head; gives what to add to the adapter's loss where the two are coupled.

        Args:
            hidden_BLH: the model's, of these inputs. count: targets of the whole step, over accumulated batches.
            logits: [M, V] of the labelled positions in order, where the model has computed them.
            kind: of this batch, where it is not that of the others.
        """
        rows = Rows.of(inputs)
        coupled, kind = self.loss_weight > 0, kind or self.kind
        hidden = hidden_BLH.detach().float()
        hidden.requires_grad_(coupled)
        self.head.follow_attention(self.base.config._attn_implementation)
        teacher = None if logits is None or kind != "kl" else _teacher(logits.detach(), rows)
        with torch.enable_grad(), self._precision(hidden.device.type):
            loss, figures = head_loss(self.head, self.trunk, hidden, rows, depth=self.depth, kind=kind, teacher=teacher)
        scaled = loss / torch.as_tensor(count if count is not None else max(1, figures[0].count), device=loss.device)
        if not torch.isfinite(scaled.detach()):
            raise DivergedError(f"mtp: the head's loss is {scaled.item()}; lower mtp.head_learning_rate")
        if scaled.requires_grad:
            scaled.backward()
        self._figures.append((float(loss.detach()), [(f.hits, f.count) for f in figures]))
        if not coupled or hidden.grad is None:
            return None
        pull = (hidden_BLH * hidden.grad.to(hidden_BLH.dtype)).sum() * self.loss_weight
        return pull - pull.detach()

    def step(self, factor: float = 1.0) -> None:
        """One optimizer step at `factor` of the learning rate, over what `learn` has added since the last."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        nn.utils.clip_grad_norm_(list(self.parameters.values()), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self._last, self._figures = _summed(self._figures), []

    def result(self) -> HeadResult:
        """What has been reached by now."""
        return HeadResult(self.steps, *self._last, sum(p.numel() for p in self.head.parameters()))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights, moments and the number of steps as plain tensors, for a checkpoint."""
        state = {f"head.{name}": tensor.detach() for name, tensor in self.head.state_dict().items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            state |= {f"optimizer.{name}.{key}": moments[key] for key in _STATE if key in moments}
        return {**state, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ModelError: it is of another head.
        """
        own = {name.removeprefix("head."): tensor for name, tensor in state.items() if name.startswith("head.")}
        try:
            self.head.load_state_dict(own)
            for name, parameter in self.parameters.items():
                found = {key: state[f"optimizer.{name}.{key}"].clone() for key in _STATE if self._has(state, name, key)}
                if found:
                    self.optimizer.state[parameter] = found
            self.steps = int(state["steps"])
        except (RuntimeError, KeyError) as error:
            raise ModelError(f"checkpoint: its multi-token-prediction head is of another recipe ({error})") from None

    @staticmethod
    def _has(state: Mapping[str, torch.Tensor], name: str, key: str) -> bool:
        return f"optimizer.{name}.{key}" in state

    @contextmanager
    def _precision(self, device: str) -> Iterator[None]:
        """bfloat16 products where the model computes in it, over fp32 weights; fp32 otherwise."""
        low = self.base.dtype == torch.bfloat16
        with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
            yield


def _teacher(logits_MV: torch.Tensor, rows: Rows) -> Teacher | None:
    """Logits of the labelled positions, found again by row: those that predict a label, in order."""
    labelled = labels_ahead(rows.labels_BL) != IGNORED
    if int(labelled.sum()) != len(logits_MV):
        return None
    index = torch.full_like(rows.labels_BL, -1)
    index[labelled] = torch.arange(len(logits_MV), device=index.device)
    return Teacher(logits_MV, index)


def _summed(figures: list[tuple[float, list[tuple[int, int]]]]) -> tuple[float, tuple[float, ...]]:
    if not figures:
        return float("nan"), ()
    depths = list(zip(*(depth for _, depth in figures), strict=True))
    shares = tuple(sum(hits for hits, _ in depth) / max(1, sum(count for _, count in depth)) for depth in depths)
    return sum(loss for loss, _ in figures) / max(1, sum(count for _, count in depths[0])), shares


class HeadSteps(TrainerCallback):  # type: ignore[misc]
    """A head that learns from each batch of the trainer and steps when the trainer's optimizer does."""

    def __init__(self, head: HeadTraining, learning_rate: float) -> None:
        self.head, self.peak = head, learning_rate
        self._listening: Any = None
        self._hidden: Any = None

    def __enter__(self) -> None:
        self._listening = self.head.listen()
        self._hidden = self._listening.__enter__()

    def __exit__(self, *exit: Any) -> None:
        self._listening.__exit__(*exit)

    def learn(
        self, result: Any, inputs: dict[str, Any], logits: torch.Tensor | None, count: torch.Tensor | int | None
    ) -> Any:
        """Take the batch in; gives the trainer's loss, with the head's pull on the adapter where they are coupled."""
        pull = self.head.learn(self._hidden(), inputs, count, logits)
        if pull is None:
            return result
        return (result[0] + pull, *result[1:]) if isinstance(result, tuple) else result + pull

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step with the adapter, at the same share of the peak learning rate."""
        self.head.step(kwargs["optimizer"].param_groups[0]["lr"] / self.peak)


def learn_after(head: HeadTraining, trainer: Trainer, steps: int) -> None:
    """Train the head on the finished adapter's hidden states, over the trainer's own batches, for as many steps."""
    model, accumulated = trainer.model, trainer.args.gradient_accumulation_steps
    model.eval()
    done = 0
    with head.listen() as hidden:
        while done < steps:
            batches = iter(trainer.get_train_dataloader())
            while done < steps:
                samples, count = trainer.get_batch_samples(batches, accumulated, trainer.args.device)
                if not samples:
                    break
                for inputs in samples:
                    inputs = trainer._prepare_inputs(inputs)
                    with torch.no_grad(), trainer.compute_loss_context_manager():
                        model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False, logits_to_keep=1)
                    head.learn(hidden(), inputs, count)
                head.step(1.0 - done / steps)
                done += 1
