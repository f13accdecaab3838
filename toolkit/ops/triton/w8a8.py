"""Rows rounded to int8 as well (W8A8): what makes it less wrong, and what decides whether it may be used.

On GeForce cards int8 tensor cores run at four times the bf16 rate, but rounding rows costs far more accuracy than
rounding weights, as a few input channels are much larger than the rest. SmoothQuant (Xiao et al., 2023, equation 4)
moves their size into the weights. Libraries do this for `nn.Linear` models offline; here a stack of experts shares one
divisor per channel, as the rows are rounded before they are routed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from toolkit.errors import RecipeError
from toolkit.quant import ExpertStack, quantize

__all__ = ["LossComparison", "SmoothedStack", "compare_losses", "smooth"]


@dataclass(frozen=True)
class SmoothedStack(ExpertStack):
    """An int8 stack whose input channels were multiplied by `smooth` [I]; the kernels divide the rows by it."""

    smooth: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """The weight it stands for, [E, O, I]: what it computes with undivided rows."""
        return super().dequantized() / self.smooth


@torch.no_grad()
def smooth(stack: ExpertStack, largest_I: torch.Tensor, strength: float = 0.5) -> SmoothedStack:
    """Requantise with large input channels moved into the weights: s = rows^strength / weights^(1 - strength).

    Args:
        stack: int8 or float.
        largest_I: the largest magnitude of each input channel over some representative rows, [I].
        strength: 0 flattens the weights' channels, 1 the rows'.

    Returns:
        A new stack of the same bytes; one expert at a time is held in fp32.
    """
    output_dim = 1 if stack.is_transposed else 0
    largest_weight_I = torch.stack([matrix.abs().amax(output_dim) for matrix in _matrices(stack)]).amax(0)
    rows_I, weights_I = (t.float().clamp(min=1e-5) for t in (largest_I, largest_weight_I))
    smooth_I = rows_I**strength / weights_I ** (1 - strength)
    along = smooth_I.unsqueeze(1) if stack.is_transposed else smooth_I
    stored = torch.empty(stack.weight.shape, dtype=torch.int8, device=stack.weight.device)
    outputs = stored.shape[2 if stack.is_transposed else 1]
    scale = torch.empty((stored.shape[0], outputs), dtype=torch.float32, device=stored.device)
    for matrix, target, target_scale in zip(_matrices(stack), stored, scale, strict=True):
        quantize(matrix * along, -2 if stack.is_transposed else -1, out=(target, target_scale))
    return SmoothedStack(stored, scale, stack.bias, stack.is_transposed, smooth_I)


def _matrices(stack: ExpertStack) -> Iterator[torch.Tensor]:
    """Each expert's matrix in fp32, as stored."""
    for expert in range(stack.weight.shape[0]):
        matrix = stack.weight[expert].float()
        if stack.scale is not None:
            scale = stack.scale[expert]
            matrix *= scale.unsqueeze(0) if stack.is_transposed else scale.unsqueeze(1)
        yield matrix


@dataclass(frozen=True)
class LossComparison:
    """Held-out loss of the same model under two expert backends."""

    plain: float
    rounded: float
    most: float

    @property
    def increase(self) -> float:
        """Relative; NaN where a loss is not finite."""
        return (self.rounded - self.plain) / abs(self.plain)

    @property
    def is_accepted(self) -> bool:
        """Whether rounding the rows costs no more than was allowed."""
        return math.isfinite(self.increase) and self.increase <= self.most

    def require(self) -> None:
        """Raises RecipeError, with both losses, where the comparison is not accepted."""
        if not self.is_accepted:
            raise RecipeError(
                f"W8A8 experts: held-out loss {self.rounded:.4f} against {self.plain:.4f} with 16-bit rows "
                f"({self.increase:+.2%}, allowed {self.most:+.2%}); keep the backend onecard_triton"
            )


def compare_losses(
    loss_of: Callable[[str], float],
    most: float = 0.005,
    plain: str = "onecard_triton",
    rounded: str = "onecard_triton_w8a8",
) -> LossComparison:
    """Evaluate the same held-out examples under both backends.

    Args:
        loss_of: the mean held-out loss with the expert backend of this name.
        most: the largest relative increase that is accepted.
    """
    return LossComparison(loss_of(plain), loss_of(rounded), most)
