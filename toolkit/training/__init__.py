"""Training: TRL's trainer on Accelerate, checkpoints, metrics and progress."""

from toolkit.training.callbacks import BestAdapter
from toolkit.training.train import TrainResult, train_adapter
from toolkit.training.trainer import RunContext

__all__ = ["BestAdapter", "RunContext", "TrainResult", "train_adapter"]
