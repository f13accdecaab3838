"""The low-rank update of one stack, in the order the expert computation wants it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["LoraFactors"]


@dataclass(frozen=True)
class LoraFactors:
    """`ΔW_e = scaling · B_e A_e`. A [E, R, I], B [E, O, R]; both may be views with any strides."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float = 1.0
