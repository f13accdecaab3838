"""Training: TRL's trainer on Accelerate, checkpoints, metrics and progress."""

from toolkit.training.best import BestAdapter
from toolkit.training.trainer import TrainResult, train_adapter

__all__ = ["BestAdapter", "TrainResult", "train_adapter"]
