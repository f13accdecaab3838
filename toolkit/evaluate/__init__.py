"""Held-out examples: loss and exact match, base against adapted; generation, plain and with drafts."""

from toolkit.evaluate.compare import Comparison, Measured, compare, held_out_loss
from toolkit.evaluate.drafts import Drafting, measure_drafts, speculator
from toolkit.evaluate.generate import answer, encode_chat

__all__ = [
    "Comparison",
    "Drafting",
    "Measured",
    "answer",
    "compare",
    "encode_chat",
    "held_out_loss",
    "measure_drafts",
    "speculator",
]
