"""The best adapter of a run by a figure of its evaluations, and stopping once that no longer gets better.

transformers keeps its best as a whole checkpoint that rotation must spare, and looks for it at the end. Here the best
adapter is one file beside the checkpoints, and the evaluations so far another, so that a resumed run knows both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from toolkit.durable import replaced_file, write_text
from toolkit.errors import ModelError
from toolkit.ranks import is_first

__all__ = ["BestAdapter", "KeepBest"]


@dataclass(frozen=True)
class BestAdapter:
    """What counts as best, and what is done about it.

    Args:
        folder: where `best.safetensors` and `best.json` go.
        metric: a figure of the evaluations. lower: whether it is better low.
        score: gives that figure, where it is not the loss.
        patience: evaluations without a better one after which training stops; None goes on.
        restore: whether the run ends with the best adapter instead of the last.
    """

    folder: Path
    metric: str
    lower: bool
    score: Callable[[], Mapping[str, float]] | None = None
    patience: int | None = None
    restore: bool = True


@dataclass
class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Watches the evaluations of `model`; in every process, since all must stop together, but only the first writes."""

    wanted: BestAdapter
    model: PeftModel
    seen: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and figure of the best evaluation, the first of equals."""
        sign = 1 if self.wanted.lower else -1
        return min(self.seen, key=lambda each: sign * each[1], default=None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the evaluations up to here; later ones, of a run that was cut off, will come again."""
        history = self.wanted.folder / "best.json"
        told = json.loads(history.read_text(encoding="utf-8")) if state.global_step and history.is_file() else []
        self.seen = [(step, value) for step, value in told if step <= state.global_step]

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the adapter if it is the best so far; stop if it has not been for too long."""
        value = kwargs["metrics"].get(f"eval_{self.wanted.metric}")
        if value is None:
            raise ModelError(f"eval.metric: the evaluation gave no {self.wanted.metric}")
        self.seen.append((state.global_step, float(value)))
        if is_first():
            if self.best == self.seen[-1]:
                _write(self._adapter(), self.wanted.folder / "best.safetensors")
            write_text(self.wanted.folder / "best.json", json.dumps(self.seen))
        if self.wanted.patience and self._waited() >= self.wanted.patience:
            control.should_training_stop = True

    def restore(self) -> tuple[int, float] | None:
        """Give the model its best adapter back; its step and figure, or None where nothing was evaluated."""
        if self.best is None or not self.wanted.restore:
            return None
        kept = load_file(self.wanted.folder / "best.safetensors") if is_first() else {}
        own = self._adapter()
        with torch.no_grad():
            for name, tensor in kept.items():
                own[name].copy_(tensor)
        return self.best

    def _waited(self) -> int:
        """Evaluations since the best one."""
        return sum(step > (self.best or (0, 0.0))[0] for step, _ in self.seen)

    def _adapter(self) -> dict[str, torch.Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """A safetensors file, whole or not at all."""
    with replaced_file(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
