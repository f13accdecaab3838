"""Rewards for `recipes/quickstart-grpo.yaml`: whether an answer begins with the right category, and ends after it."""

from __future__ import annotations

__all__ = ["begins_with", "ends_well"]

_END = 2
"""The embedded model's token at the end of a turn."""


def begins_with(completions: list[list[dict[str, str]]], answer: list[str], **columns: object) -> list[float]:
    """1 for each answer that does, whatever follows."""
    said = (turns[0]["content"].strip() for turns in completions)
    return [float(text.startswith(wanted)) for text, wanted in zip(said, answer, strict=True)]


def ends_well(
    completions: list[list[dict[str, str]]], completion_ids: list[list[int]], answer: list[str], **columns: object
) -> list[float]:
    """1 for each answer that is the right category and ends its turn; special tokens do not show in the text alone."""
    said = (turns[0]["content"].strip() for turns in completions)
    return [
        float(text == wanted and ids[-1] == _END)
        for text, wanted, ids in zip(said, answer, completion_ids, strict=True)
    ]
