"""Training: TRL's trainer on Accelerate, the run folder, metrics and progress."""

from toolkit.training.best import BestAdapter
from toolkit.training.run import RunFolder, check_writable, open_run
from toolkit.training.trainer import TrainResult, train_adapter

__all__ = ["BestAdapter", "RunFolder", "TrainResult", "check_writable", "open_run", "train_adapter"]
