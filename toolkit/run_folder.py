"""Where each part of a run lies.

recipe.yaml  plan.json  chat.json  metrics.jsonl  reference.safetensors  checkpoints/  adapter/  experts.json
summary.json  report.html
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["RunFolder"]


@dataclass(frozen=True)
class RunFolder:
    """Where each part of a run lies."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """The plan, JSON."""
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The artifact."""
        return self.path / "adapter"

    @property
    def chat(self) -> Path:
        """How the trained model is asked, and what ends its answers."""
        return self.path / "chat.json"

    @property
    def start(self) -> Path:
        """The adapter that a fork starts from."""
        return self.path / "start"

    @property
    def reference(self) -> Path:
        """What a preference run's reference gives its pairs, computed before the first step."""
        return self.path / "reference.safetensors"

    @property
    def forked_reference(self) -> Path:
        """The same of the run that a fork comes from."""
        return self.start / self.reference.name

    @property
    def compensated(self) -> Path:
        """The base's integers after error compensation, where the recipe asks for it."""
        return self.path / "compensated.safetensors"

    @property
    def mixture(self) -> Path:
        """Which layers are int8 and which int4, and what was measured, where the recipe gives a budget."""
        return self.path / "mixture.json"

    @property
    def experts(self) -> Path:
        """What happened to the experts: load, router entropy, adapter size, by layer."""
        return self.path / "experts.json"

    @property
    def report(self) -> Path:
        """The run's page."""
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        """Coverage and results; its presence says that the run is finished."""
        return self.path / "summary.json"

    def read_summary(self) -> dict[str, Any] | None:
        """The finished run's summary, or None while it is not finished."""
        if not self.summary.is_file():
            return None
        summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        return summary

    def read_metrics(self) -> list[dict[str, Any]]:
        """Lines of `metrics`; the last may still be in the writing, and a resumed run writes some steps again."""
        entries: dict[tuple[int, bool], dict[str, Any]] = {}
        for line in self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if "loss" in entry or "eval_loss" in entry:
                entries[(entry["step"], "loss" in entry)] = entry
        return [entries[key] for key in sorted(entries)]
