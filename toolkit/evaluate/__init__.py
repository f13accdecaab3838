"""Held-out examples: loss and metrics, base against adapted, and generation."""

from toolkit.evaluate.compare import Comparison, Measured, compare, held_out_loss, score_now
from toolkit.evaluate.general import read_windows
from toolkit.evaluate.generate import answer, encode_chat, sampling
from toolkit.evaluate.harness import require_harness, run_harness
from toolkit.evaluate.metrics import LOSS, find_metric

__all__ = [
    "LOSS",
    "Comparison",
    "Measured",
    "answer",
    "compare",
    "encode_chat",
    "find_metric",
    "held_out_loss",
    "read_windows",
    "require_harness",
    "run_harness",
    "sampling",
    "score_now",
]
