"""What a training run depends on beside its model and its data, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from toolkit.mtp.training import HeadTraining
from toolkit.signals import StopRequest
from toolkit.training.best import BestAdapter
from toolkit.training.checkpoint import Resume
from toolkit.training.resumable import SavedPart

__all__ = ["RunContext"]


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Everything that training depends on beside the model and the data.

    Args:
        folder: checkpoints. metrics: the JSON-lines file.
        arguments: fields of the recipe's training section, by TRL's names.
        device: cpu or cuda. dtype: float32, bfloat16 or float16, of the computation.
        train_router: whether the load-balancing loss applies.
        best: what to keep or stop for.
        advice: what to change where memory does not suffice for the longest batch.
        probes: whether that batch goes first. It changes no number; it costs a batch's time.
        micro_batches_per_pass: those that go through a streamed layer before the next; None for all of a step.
        resume: the checkpoint to go on from and what new ones are bound to; without it the newest valid one, unbound.
        stop: told of signals. places: where each training row came from. parts: trained and saved beside the adapter.
        head: a multi-token-prediction head to train in the same steps, or `after` them in as many.
    """

    folder: Path
    metrics: Path
    arguments: Mapping[str, Any]
    device: str
    dtype: str
    console: Console
    train_router: bool = True
    best: BestAdapter | None = None
    advice: str = "a smaller training.max_length"
    probes: bool = True
    micro_batches_per_pass: int | None = None
    resume: Resume | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    places: Sequence[str] = ()
    parts: Mapping[str, SavedPart] = field(default_factory=dict)
    head: HeadTraining | None = None
    head_stage: str = "with"

    @property
    def head_beside(self) -> HeadTraining | None:
        """The head, where it learns in the adapter's steps."""
        return self.head if self.head_stage == "with" else None
