"""Held-out examples: loss and exact match, base against adapted, and generation."""

from toolkit.evaluate.compare import Comparison, Measured, compare, held_out_loss
from toolkit.evaluate.generate import answer, encode_chat

__all__ = ["Comparison", "Measured", "answer", "compare", "encode_chat", "held_out_loss"]
