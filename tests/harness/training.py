"""What a trainer is told in tests and sweeps, from the recipe's training section and with nothing on the screen."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from toolkit.recipe import TrainingSection
from toolkit.training import RunContext

__all__ = ["run_context"]


def run_context(folder: Path, section: TrainingSection, **beside: Any) -> RunContext:
    """A run in `folder` on this CPU in fp32; its console writes to a `StringIO`. `beside`: further fields."""
    folder.mkdir(exist_ok=True)
    return RunContext(
        folder=folder / "checkpoints",
        metrics=folder / "metrics.jsonl",
        arguments={**section.model_dump(exclude={"output_dir"}), "report_to": []},
        device="cpu",
        dtype="float32",
        **{"console": Console(file=io.StringIO(), width=300), **beside},
    )
