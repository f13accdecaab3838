"""The expert computation. `reference` is the law; every backend is registered with transformers under its own name."""

from toolkit.ops.factors import LoraFactors
from toolkit.ops.registry import BACKENDS, DEFAULT_BACKEND, FACTORS, keep_up_outputs

__all__ = ["BACKENDS", "DEFAULT_BACKEND", "FACTORS", "LoraFactors", "keep_up_outputs"]
