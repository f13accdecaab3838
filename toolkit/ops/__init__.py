"""The expert computation. `reference` is the law; every backend is registered with transformers under its own name.

The registry is imported when first asked for: the kernels need torch and triton alone, and `scripts/gpu_check.py` uses
them without transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from toolkit.ops.factors import LoraFactors

if TYPE_CHECKING:
    from toolkit.ops.linear import adapted_linear
    from toolkit.ops.registry import BACKENDS, DEFAULT_BACKEND, FACTORS, keep_up_outputs

__all__ = ["BACKENDS", "DEFAULT_BACKEND", "FACTORS", "LoraFactors", "adapted_linear", "keep_up_outputs"]

_HOMES = {
    **dict.fromkeys(["BACKENDS", "DEFAULT_BACKEND", "FACTORS", "keep_up_outputs"], "toolkit.ops.registry"),
    "adapted_linear": "toolkit.ops.linear",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'toolkit.ops' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
