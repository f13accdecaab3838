"""Held-out examples: loss and metrics, base against adapted, generation, and where experts went."""

from toolkit.evaluate.compare import Comparison, Measured, compare, held_out_loss, read_windows, score_now
from toolkit.evaluate.ends import unsure_end
from toolkit.evaluate.generate import answer, answer_ids, sampling
from toolkit.evaluate.harness import require_harness, run_harness
from toolkit.evaluate.metrics import LOSS, find_metric
from toolkit.evaluate.preferences import reward_figures
from toolkit.evaluate.routing import adapter_norms, expert_statistics, router_entropy

__all__ = [
    "LOSS",
    "Comparison",
    "Measured",
    "adapter_norms",
    "answer",
    "answer_ids",
    "compare",
    "expert_statistics",
    "find_metric",
    "held_out_loss",
    "read_windows",
    "require_harness",
    "reward_figures",
    "router_entropy",
    "run_harness",
    "sampling",
    "score_now",
    "unsure_end",
]
