"""The multi-token-prediction head inside the trainer's steps, or after them; saved as a part of every checkpoint.

TRL and transformers train one model with one optimizer. The head is kept out of both, so that the adapter's gradients,
clipping and steps stay what they are without it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from toolkit.mtp.training import HeadTraining

__all__ = ["HeadSteps", "learn_after"]


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
