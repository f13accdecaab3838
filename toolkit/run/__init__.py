"""A run, from a recipe to a finished folder: these are its steps, which `job` calls in order."""

from toolkit.run.data import build_batches, check_tokens, dialogue, load_tokenizer, step_shape
from toolkit.run.evaluation import evaluate, require_harmless_rounding
from toolkit.run.mixture import choose_stacks
from toolkit.run.model import attach, compensate, coverage, load, reopen
from toolkit.run.mtp import evaluate_head, make_head, own_answers, reopen_head, step_tokens, teach_own_answers
from toolkit.run.trained import Trained, judge, package, train

__all__ = [
    "Trained",
    "attach",
    "build_batches",
    "check_tokens",
    "choose_stacks",
    "compensate",
    "coverage",
    "dialogue",
    "evaluate",
    "evaluate_head",
    "judge",
    "load",
    "load_tokenizer",
    "make_head",
    "own_answers",
    "package",
    "reopen",
    "reopen_head",
    "require_harmless_rounding",
    "step_shape",
    "step_tokens",
    "teach_own_answers",
    "train",
]
