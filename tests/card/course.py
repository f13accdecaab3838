"""What a run did to the card, part by part and step by step, seen from outside: the job knows nothing of it.

Peaks are of a part alone, so torch's own count starts anew after each: what the run's summary says of its peak is less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from tests.card import library, replay
from toolkit.steps import Steps

__all__ = ["Course"]


class Course:
    """Memory at the end of each part of a verb, and counts around each optimizer step.

    `prepare` is given the model before the first step. The program ends well after the part that is called `until`.
    """

    def __init__(self, prepare: Callable[[Any], None] = lambda model: None, until: str | None = None) -> None:
        self.parts: list[dict[str, Any]] = []
        self.steps: list[dict[str, int]] = []
        course = self

        class Watching(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                if not course.steps:
                    course.note("before step 1")
                    prepare(kwargs["model"])
                course.began = _counts()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                now = _counts()
                course.steps.append({name: now[name] - course.began[name] for name in now})
                course.note(f"step {len(course.steps)}")

        DEFAULT_CALLBACKS.append(Watching)
        self._end = Steps.end

        def end(steps: Steps, *, failed: bool = False) -> None:
            name = steps._open[-1].name
            course.note(name)
            course._end(steps, failed=failed)
            if name == until and not failed:
                raise SystemExit(0)

        Steps.end = end  # type: ignore[method-assign]  # the one place that hears of every part, of any verb

    def note(self, name: str) -> None:
        """A part is over: what it held at its peak, and what is held now. Nothing is said before CUDA is in use."""
        if not torch.cuda.is_initialized():
            return
        statistics = {
            "allocated": torch.cuda.memory_allocated(),
            "allocated_peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "reserved_peak": torch.cuda.max_memory_reserved(),
            "used": library.counts().used,
        }
        self.parts.append({"part": name, **statistics})
        torch.cuda.reset_peak_memory_stats()


def _counts() -> dict[str, int]:
    """The library's, with the waits that it does not see."""
    found = asdict(library.counts())
    found["synchronizations"] += replay.at_once.total()
    return found
