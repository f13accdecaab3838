"""Rewards: what a written answer is worth, by functions that run in a process of their own. Imports no torch."""

from toolkit.rewards.judge import Asked, Judge, Reward, Scores
from toolkit.rewards.measures import BUILT_IN, COMPARING, exact_match, json_valid

__all__ = ["BUILT_IN", "COMPARING", "Asked", "Judge", "Reward", "Scores", "exact_match", "json_valid"]
