"""Training: TRL's trainers on Accelerate, checkpoints, metrics and progress."""

from toolkit.training.adapter_steps import Preference, RunContext
from toolkit.training.callbacks import BestAdapter
from toolkit.training.train import TrainResult, train_adapter

__all__ = ["BestAdapter", "Preference", "RunContext", "TrainResult", "train_adapter"]
