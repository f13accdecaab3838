"""Training: TRL's trainer on Accelerate, the run folder, checkpoints, signals, metrics and progress."""

from toolkit.training.best import BestAdapter
from toolkit.training.fork import copy_start, fork_recipe
from toolkit.training.lock import owned
from toolkit.training.resume import Resume, data_sha256, find_resume, tokenizer_sha256, versions
from toolkit.training.run import RunFolder, check_folder_is_ours, check_writable, open_run, require_disk
from toolkit.training.trainer import TrainResult, train_adapter

__all__ = [
    "BestAdapter",
    "Resume",
    "RunFolder",
    "TrainResult",
    "check_folder_is_ours",
    "check_writable",
    "copy_start",
    "data_sha256",
    "find_resume",
    "fork_recipe",
    "open_run",
    "owned",
    "require_disk",
    "tokenizer_sha256",
    "train_adapter",
    "versions",
]
