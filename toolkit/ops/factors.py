"""The low-rank update of one stack, in the order the expert computation wants it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["LoraFactors"]


@dataclass(frozen=True)
class LoraFactors:
    """`ΔW_e = B_e A_e`, the scaling already in B. A [E, R, I], B [E, O, R]."""

    A: torch.Tensor
    B: torch.Tensor
