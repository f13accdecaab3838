"""Experts' rows in int8 as well (W8A8): what decides whether they may be used.

On GeForce cards int8 tensor cores run at four times the bf16 rate. Rows of one int8 digit cost far more accuracy than
int8 weights do, as a few input channels are much larger than the rest; SmoothQuant (Xiao et al., 2023) moves their size
into the weights, which must be rounded anew for it. Two digits, at twice the bf16 rate, need none of that: they are
sixteen bits. The loss is compared all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from toolkit.errors import RecipeError

__all__ = ["LossComparison", "compare_losses"]


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
