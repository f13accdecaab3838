"""Which gate an experts module has, as numbers a kernel can be compiled for.

transformers gives every experts module a callable from the first projection's output to the second's input. Its form is
guessed from what the module says of itself (its limits and alphas), and believed only where the callable gives the same
numbers; whatever does not match stays a callable and runs in torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional

__all__ = ["GateForm", "recognize"]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "silu": lambda x, alpha: x * torch.sigmoid(alpha * x),
    "gelu": lambda x, alpha: functional.gelu(x),
    "gelu_tanh": lambda x, alpha: functional.gelu(x, approximate="tanh"),
    "relu": lambda x, alpha: functional.relu(x),
    "relu_squared": lambda x, alpha: functional.relu(x).square(),
}
_TOLERANCE = 1e-5
"""Between two ways of writing the same gate in fp32; the nearest two activations (both GELUs) differ by 1e-4."""


@dataclass(frozen=True)
class GateForm:
    """act(min(left, limit); alpha) · (clamp(right, ±limit) + offset), or act(y) alone where not `is_gated`."""

    activation: str
    is_gated: bool = True
    is_interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.0
    offset: float = 0.0

    def __call__(self, y_SO: torch.Tensor) -> torch.Tensor:
        """The same in torch: [S, 2I] to [S, I], or [S, I] to [S, I]."""
        act = _ACTIVATIONS[self.activation]
        if not self.is_gated:
            return act(y_SO if self.limit is None else y_SO.clamp(max=self.limit), self.alpha)
        left, right = (y_SO[..., ::2], y_SO[..., 1::2]) if self.is_interleaved else y_SO.chunk(2, dim=-1)
        if self.limit is not None:
            left, right = left.clamp(max=self.limit), right.clamp(-self.limit, self.limit)
        return act(left, self.alpha) * (right + self.offset)

    def width(self, outputs: int) -> int:
        """I, for a first projection of so many outputs."""
        return outputs // 2 if self.is_gated else outputs


_known: WeakKeyDictionary[object, GateForm | None] = WeakKeyDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def recognize(gate: Callable[[torch.Tensor], torch.Tensor], outputs: int, device: torch.device) -> GateForm | None:
    """The form whose numbers the callable gives on [16, outputs] probes, None where there is none.

    A module is probed once; a bound method stands for its module.
    """
    owner = gate.__self__ if isinstance(gate, MethodType) else gate
    if owner not in _known:
        _known[owner] = _probe(gate, owner, outputs, device)
    return _known[owner]


@torch.no_grad()
def _probe(gate: Callable[..., torch.Tensor], owner: object, outputs: int, device: torch.device) -> GateForm | None:
    # No random numbers: a probe must not move the run's. Sizes from 1e-2 to 1e3, so that every limit shows.
    wave = torch.arange(16 * outputs, device=device, dtype=torch.float32).view(16, outputs).mul(0.7310585).sin()
    probe = wave * torch.logspace(-2, 3, 16, device=device).unsqueeze(1)
    wanted = gate(probe.clone())
    for form in _forms(owner, is_gated=wanted.shape[-1] * 2 == outputs):
        if form.width(outputs) == wanted.shape[-1]:
            error = (form(probe) - wanted).abs()
            if bool((error <= _TOLERANCE * (1 + wanted.abs())).all()):
                return form
    return None


def _forms(owner: object, is_gated: bool) -> Iterator[GateForm]:
    limits = [None, *_numbers(owner, "limit")]
    alphas = [1.0, *_numbers(owner, "alpha")]
    layouts = [(True, False), (True, True)] if is_gated else [(False, False)]
    for name, (gated, interleaved), limit, alpha, offset in itertools.product(
        _ACTIVATIONS, layouts, limits, alphas, (0.0, 1.0) if is_gated else (0.0,)
    ):
        if alpha == 1.0 or name == "silu":
            yield GateForm(name, gated, interleaved, limit, alpha, offset)


def _numbers(owner: object, word: str) -> list[float]:
    """Numbers among the module's attributes whose name holds the word."""
    attributes = getattr(owner, "__dict__", {})
    return [float(v) for k, v in attributes.items() if word in k and type(v) in (int, float) and float(v) > 0]
