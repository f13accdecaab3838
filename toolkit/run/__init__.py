"""A run, from a recipe to a finished folder: its parts, its folder, and how it goes on after a stop."""

from toolkit.run.chat_form import dialogue, record_form, stop_as_trained
from toolkit.run.data import build_batches, load_tokenizer, step_shape
from toolkit.run.evaluation import evaluate, look_at_experts, require_harmless_rounding
from toolkit.run.folder import check_folder_is_ours, check_writable, open_run, require_disk
from toolkit.run.fork import copy_start, fork_recipe
from toolkit.run.lock import owned
from toolkit.run.model import attach, compensate, coverage, load, reopen
from toolkit.run.mtp import evaluate_head, make_head, own_answers, reopen_head, step_tokens, teach_own_answers
from toolkit.run.resume import data_sha256, find_resume, tokenizer_sha256, versions
from toolkit.run.trained import Trained, find_checkpoint, judge, package, require_packageable, train

__all__ = [
    "Trained",
    "attach",
    "build_batches",
    "check_folder_is_ours",
    "check_writable",
    "compensate",
    "copy_start",
    "coverage",
    "data_sha256",
    "dialogue",
    "evaluate",
    "evaluate_head",
    "find_checkpoint",
    "find_resume",
    "fork_recipe",
    "judge",
    "load",
    "load_tokenizer",
    "look_at_experts",
    "make_head",
    "open_run",
    "own_answers",
    "owned",
    "package",
    "record_form",
    "reopen",
    "reopen_head",
    "require_disk",
    "require_harmless_rounding",
    "require_packageable",
    "step_shape",
    "step_tokens",
    "stop_as_trained",
    "teach_own_answers",
    "tokenizer_sha256",
    "train",
    "versions",
]
