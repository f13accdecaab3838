"""What watches the steps: the metrics log, the line on the terminal, adapters that do not move, the best adapter.

Metrics go to `metrics.jsonl`; progress is a live line on a terminal, plain lines elsewhere. transformers keeps its best
as a whole checkpoint that rotation must spare, and looks for it at the end. Here the best adapter is one file beside
the checkpoints, and the evaluations so far another, so that a resumed run knows both.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from toolkit.adapters import unmoved_adapters
from toolkit.durable import replaced_file, sync, write_text
from toolkit.errors import ModelError, ResourceError
from toolkit.processes import is_first

__all__ = [
    "BestAdapter",
    "KeepBest",
    "MetricsLog",
    "ProgressDisplay",
    "UnmovedAdapters",
    "held_out_scores",
    "peak_memory",
]

_PLAIN_SECONDS = 5.0
_NOT_SCORES = {
    "aux_loss", "entropy", "logits/chosen", "logits/rejected", "logps/chosen", "logps/rejected", "loss",
    "mean_token_accuracy", "num_tokens", "rewards/chosen", "rewards/rejected", "runtime", "samples_per_second",
    "steps_per_second",
}  # fmt: skip
"""What an evaluation logs of its own accord and nobody needs to be told; of pairs there are accuracy and margin too."""
_NOT_SCORES_OF_ANSWERS = (
    "clip_ratio/", "completions/max_", "completions/mean_terminated", "completions/min_", "frac_reward", "reward_std",
)  # fmt: skip
"""Beginnings of names that likewise need not be told of written answers; nor do deviations."""
_RERUN = "checkpoints are intact: free space or fix the disk, then rerun the same command"


def peak_memory(device: str) -> int:
    """Bytes: the card's peak allocation, or the process's peak resident set."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsLog(TrainerCallback):  # type: ignore[misc]
    """Appends one JSON object a log event; tokens_per_second counts real tokens, padding not."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.device = device
        self.last: dict[str, Any] = {}
        self._clock = time.perf_counter()
        self._tokens = 0.0

    def position(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def settle(self) -> None:
        """Make what is written durable."""
        if self.path.exists():
            sync(self.path)

    def go_on(self, position: int, tokens: float) -> None:
        """Forget what was logged beyond `position` bytes, and count on from `tokens`."""
        if self.position() > position:
            os.truncate(self.path, position)
        self._tokens = tokens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._clock = time.perf_counter()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the line."""
        logs = dict(kwargs.get("logs") or {})
        entry = {"step": state.global_step, **logs, "memory_bytes": peak_memory(self.device)}
        if state.max_steps > 0:
            entry["progress"] = state.global_step / state.max_steps
        tokens = float(logs.get("num_tokens", 0.0))
        now = time.perf_counter()
        if tokens > self._tokens:
            entry["tokens_per_second"] = (tokens - self._tokens) / (now - self._clock)
            self._clock, self._tokens = now, tokens
        self.last = entry
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be written ({error.strerror}); {_RERUN}") from None


class UnmovedAdapters(TrainerCallback):  # type: ignore[misc]
    """Names the adapters that have not moved after some steps, while there is time to do something about it."""

    after = 10
    """Steps: warm-up is over by then in any run that learns, and each adapter has seen many tokens."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look once."""
        if state.global_step == self.after and (still := unmoved_adapters(kwargs["model"])):
            shown = ", ".join(still[:5]) + (", …" if len(still) > 5 else "")
            self.console.print(f"step {self.after}: {len(still)} adapters have not moved: {shown}", highlight=False)


class ProgressDisplay(TrainerCallback):  # type: ignore[misc]
    """Step, loss, tokens/s, memory and time left. Reads the entry that `metrics` wrote last."""

    def __init__(self, console: Console, metrics: MetricsLog) -> None:
        self.console = console
        self.metrics = metrics
        self._progress: Progress | None = None
        self._began = self._printed = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the live line."""
        self._began = self._printed = time.perf_counter()
        if self.console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self._progress.start()
            self._progress.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on."""
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the newest numbers."""
        entry = self.metrics.last
        if "loss" in entry:
            text = _describe(entry)
            if self._progress:
                self._progress.update(self._progress.task_ids[0], description=text)
            elif time.perf_counter() - self._printed >= _PLAIN_SECONDS or state.global_step in (1, state.max_steps):
                self._printed = time.perf_counter()
                self.console.print(
                    f"step {state.global_step}/{state.max_steps}  {text}  {self._left(state)}", highlight=False
                )
        elif "eval_loss" in entry:
            scores = held_out_scores(entry)
            if "eval_reward" not in entry:  # the loss of rewards says nothing
                scores = {"loss": entry["eval_loss"], **scores}
            told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            told = f"step {state.global_step}: held-out {told}"
            self.console.print(told, highlight=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the live line."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _left(self, state: TrainerState) -> str:
        spent = time.perf_counter() - self._began
        return f"ETA {spent / max(1, state.global_step) * (state.max_steps - state.global_step):.0f} s"


def held_out_scores(entry: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation's line that were asked for beside its loss, by their short names."""
    found = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
    told = (name for name in found if name not in _NOT_SCORES and not name.endswith("/std"))
    return {
        name: found[name] for name in told if not name.startswith(_NOT_SCORES_OF_ANSWERS) and found[name] is not None
    }


def _describe(entry: dict[str, Any]) -> str:
    speed = f"{entry['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in entry else ""
    return f"loss {entry['loss']:.4f}  {speed}  {entry['memory_bytes'] / 2**30:.2f} GiB"


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
    stopped_at: int | None = None
    """The step at which patience ended, where it did."""

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
            self.stopped_at = state.global_step

    def why_stopped(self, planned: int) -> str | None:
        """One line where patience ended before the `planned` steps were done."""
        if self.stopped_at is None or self.best is None or self.stopped_at >= planned:
            return None
        step, value = self.best
        return (
            f"stopped early at step {self.stopped_at} of {planned}: {self._waited()} evaluations in a row were no "
            f"better than {self.wanted.metric} {value:.4f} at step {step} (training.early_stopping_patience)"
        )

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
