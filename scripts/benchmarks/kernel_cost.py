"""Operations and bytes of an expert layer, kernel by kernel: arithmetic on shapes, so limits are known without a card.

Profilers count these after a run. A kernel is charged for each input once and each output once, whatever caches miss;
experts are all counted as hit, which beyond some two thousand tokens they are.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerShape", "Work", "backward", "forward", "step_bytes"]


@dataclass(frozen=True)
class LayerShape:
    """T tokens, K experts per token, E experts, H hidden, I intermediate, R rank; gate and up in one projection."""

    name: str
    T: int
    K: int
    E: int
    H: int
    I: int  # noqa: E741
    R: int = 16

    @property
    def S(self) -> int:
        """Routed rows."""
        return self.T * self.K

    @property
    def O(self) -> int:  # noqa: E743
        """Outputs of the first projection."""
        return 2 * self.I


@dataclass(frozen=True)
class Work:
    """One kernel's call: floating-point operations (products with frozen weights apart) and bytes of device memory."""

    kernel: str
    frozen_flops: float
    other_flops: float
    moved: float

    @property
    def flops(self) -> float:
        """All of them."""
        return self.frozen_flops + self.other_flops


def forward(shape: LayerShape) -> list[Work]:
    """The calls of one forward, in order."""
    return [*_up(shape), *_down(shape), _gather_sum("gather-sum", shape)]


def backward(shape: LayerShape) -> list[Work]:
    """The calls of one backward: the first projection again, then every gradient."""
    T, S, H, I, O = shape.T, shape.S, shape.H, shape.I, shape.O  # noqa: E741
    return [
        *(Work(f"{work.kernel} again", work.frozen_flops, work.other_flops, work.moved) for work in _up(shape)),
        _low("down: grad B", shape, T * H, H),
        _frozen("down: grad W", shape, T * H, H, I),
        Work("gate backward", 0, 20 * S * I, 2 * (2 * S * O + 2 * S * I)),
        _low("down: x A'", shape, S * I, I),
        _gram("down: dA", shape, S * I, I),
        _gram("down: dB", shape, T * H, H),
        _low("up: grad B", shape, S * O, O),
        _gram("up: dA", shape, T * H, H),
        _gram("up: dB", shape, S * O, O),
        _frozen("up: grad W", shape, S * O, O, H),
        _gather_sum("gather-sum of dX", shape),
    ]


def step_bytes(shape: LayerShape, itemsize: int = 2) -> int:
    """Most device memory that forward and backward hold at once beyond weights, factors, input and incoming gradient.

    It peaks where the input's gradient is made: the first projection's gradient, its rows and their sum, beside the
    factors' gradients in fp32.
    """
    S, T, R = shape.S, shape.T, shape.R
    factors = 4 * shape.E * R * (2 * shape.H + shape.O + shape.I)
    return factors + itemsize * max(S * (shape.O + shape.I), S * (shape.O + shape.H) + T * shape.H)


def _up(shape: LayerShape) -> list[Work]:
    rows = shape.T * shape.H
    return [_low("up: x A'", shape, rows, shape.H), _frozen("up: x W'", shape, rows, shape.H, shape.O)]


def _down(shape: LayerShape) -> list[Work]:
    S, I = shape.S, shape.I  # noqa: E741
    return [
        Work("gate", 0, 8 * S * I, 2 * (S * shape.O + S * I)),
        _low("down: x A'", shape, S * I, I),
        _frozen("down: x W'", shape, S * I, I, shape.H),
    ]


def _frozen(kernel: str, shape: LayerShape, read: int, inputs: int, outputs: int) -> Work:
    """int8 weights with a scale a row, bf16 rows (`read` elements of them), the low-rank update in the epilogue."""
    S, E, R = shape.S, shape.E, shape.R
    weight = E * inputs * outputs + 4 * E * max(inputs, outputs)
    low_rank = 2 * (S * R + E * outputs * R)
    return Work(kernel, 2 * S * inputs * outputs, 2 * S * outputs * R, 2 * read + weight + low_rank + 2 * S * outputs)


def _low(kernel: str, shape: LayerShape, read: int, inputs: int) -> Work:
    S, E, R = shape.S, shape.E, shape.R
    return Work(kernel, 0, 2 * S * inputs * R, 2 * (read + E * inputs * R + S * R))


def _gram(kernel: str, shape: LayerShape, read: int, width: int) -> Work:
    S, E, R = shape.S, shape.E, shape.R
    return Work(kernel, 0, 2 * S * width * R, 2 * (read + S * R) + 4 * E * width * R)


def _gather_sum(kernel: str, shape: LayerShape) -> Work:
    S, T, H = shape.S, shape.T, shape.H
    return Work(kernel, 0, 2 * S * H, 2 * (S * H + T * H) + 8 * S)
