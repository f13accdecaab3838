"""Training: TRL's trainer on Accelerate, checkpoints, metrics and progress."""

from toolkit.training.best import BestAdapter
from toolkit.training.trainer import RunContext, TrainResult, train_adapter

__all__ = ["BestAdapter", "RunContext", "TrainResult", "train_adapter"]
