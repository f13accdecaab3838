"""What the figures of written answers are called on a run's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["titles_of_answers"]

_OF_ANSWERS = {
    "reward": ("Reward of written answers", "weighted sum"),
    "completions/mean_length": ("Length of written answers", "tokens"),
    "kl": ("Distance from the base", "nats per token"),
    "entropy": ("Entropy of what is written", "nats per token"),
}
"""Figures of answers that the model writes in training: their titles and units."""


def titles_of_answers(metrics: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Titles and units of figures of written answers, each reward's own among them; none where nothing was rewarded."""
    if not any("reward" in entry for entry in metrics):
        return {}
    names = dict.fromkeys(name for entry in metrics for name in entry if _is_of_a_reward(name))
    return {**_OF_ANSWERS, **{name: (f"Reward {name.split('/')[1]}", "mean") for name in names}}


def _is_of_a_reward(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")
