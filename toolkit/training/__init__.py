"""Training: TRL's trainer on Accelerate, checkpoints, metrics and progress."""

from toolkit.training.best import BestAdapter
from toolkit.training.context import RunContext
from toolkit.training.trainer import TrainResult, train_adapter

__all__ = ["BestAdapter", "RunContext", "TrainResult", "train_adapter"]
