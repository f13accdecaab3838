"""What rounding adds to weights that others had quantised: measured while they load, on one expert of each stack."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Requantised"]

_INPUTS = 32
"""Rows of Gaussian inputs that outputs are compared on."""


@dataclass
class Requantised:
    """Formats that were read, and the relative errors of what was compared: weights, and outputs of random inputs.

    Errors are roots of summed squares: those of the difference over those of what was multiplied out. `zero_experts`
    counts projections of experts that are all zeros: a quantiser whose data never reached them leaves such.
    """

    formats: Counter[str] = field(default_factory=Counter)
    matrices: int = 0
    zero_experts: int = 0
    _sums: dict[str, float] = field(default_factory=dict)

    def compare(self, weight: Tensor, found: Tensor, input_dim: int) -> None:
        """One matrix [O, I], or [I, O] with `input_dim` -2, and what it was rounded to, multiplied out."""
        wanted, off = weight.float(), found - weight.float()
        if input_dim == -2:
            wanted, off = wanted.t(), off.t()
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(_INPUTS, wanted.shape[1], generator=generator).to(wanted.device)
        outputs = inputs @ wanted.t(), inputs @ off.t()
        for name, tensor in zip(
            ("weights", "weights off", "outputs", "outputs off"), (wanted, off, *outputs), strict=True
        ):
            self._sums[name] = self._sums.get(name, 0.0) + float(tensor.double().square().sum())
        self.matrices += 1

    def to_dict(self) -> dict[str, Any] | None:
        """JSON-able: formats and their tensors, errors of weights and outputs; None where nothing was requantised."""
        if not self.formats:
            return None
        errors = {
            name: math.sqrt(self._sums.get(f"{name} off", 0.0) / max(self._sums.get(name, 0.0), 1e-300))
            for name in ("weights", "outputs")
        }
        counts = {"matrices": self.matrices, "zero_experts": self.zero_experts}
        return {"formats": dict(sorted(self.formats.items())), **counts, **errors}
