"""Held-out examples: loss and exact match, base against adapted, generation, and where experts went."""

from toolkit.evaluate.compare import Comparison, Measured, compare, held_out_loss
from toolkit.evaluate.generate import answer, encode_chat
from toolkit.evaluate.routing import adapter_norms, expert_statistics, router_entropy

__all__ = [
    "Comparison",
    "Measured",
    "adapter_norms",
    "answer",
    "compare",
    "encode_chat",
    "expert_statistics",
    "held_out_loss",
    "router_entropy",
]
