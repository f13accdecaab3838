"""A reward for `recipes/quickstart-grpo.yaml`: whether an answer begins with the right category."""

from __future__ import annotations

__all__ = ["begins_with"]


def begins_with(completions: list[list[dict[str, str]]], answer: list[str], **columns: object) -> list[float]:
    """1 for each answer that does. What follows is not judged: the model in the repository never learnt to end well."""
    said = (turns[0]["content"].strip() for turns in completions)
    return [float(text.startswith(wanted)) for text, wanted in zip(said, answer, strict=True)]
