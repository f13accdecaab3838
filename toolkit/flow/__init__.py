"""The one flow: plan -> load -> attach -> build_batches -> train -> package, each step a function of the plan.

These are the public verbs. They only hand the plan's fields to the rooms, which take plain arguments.
"""

from toolkit.flow.asking import dialogue, record_form, stop_as_trained
from toolkit.flow.finish import Trained, package, require_packageable, resume, train
from toolkit.flow.head import evaluate_head, make_head, own_answers, reopen_head, step_tokens, teach_own_answers
from toolkit.flow.judge import evaluate, look_at_experts, require_harmless_rounding
from toolkit.flow.start import (
    attach,
    build_batches,
    compensate,
    coverage,
    load,
    load_tokenizer,
    reopen,
    step_shape,
)

__all__ = [
    "Trained",
    "attach",
    "build_batches",
    "compensate",
    "coverage",
    "dialogue",
    "evaluate",
    "evaluate_head",
    "load",
    "load_tokenizer",
    "look_at_experts",
    "make_head",
    "own_answers",
    "package",
    "record_form",
    "reopen",
    "reopen_head",
    "require_harmless_rounding",
    "require_packageable",
    "resume",
    "step_shape",
    "step_tokens",
    "stop_as_trained",
    "teach_own_answers",
    "train",
]
