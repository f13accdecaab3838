"""The parts of an MoE model as data: expert layers, linears and their roles, without a module or a weight.

`toolkit.architecture` finds them in a model; a plan of a published model has them from a record, and loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "E2M1",
    "FOUR_BITS",
    "FOUR_BIT_GROUP",
    "LINEAR_ROLES",
    "Architecture",
    "ExpertLayer",
    "Linear",
    "can_hold_four_bits",
    "parsed_kind",
]

FOUR_BITS = ("int4", "mxfp4")
"""What expert stacks can be rounded to in four bits."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of FP4's codes without the sign, which is the fourth bit (OCP's MX specification 1.0)."""
FOUR_BIT_GROUP = 32
"""Inputs of a four-bit weight that share a step or a scale, where nothing else is said."""

LINEAR_ROLES = ("attention", "shared", "dense")
"""Linears that are stored in 8 bit; heads, routers and gates keep their dtype."""


def parsed_kind(kind: str) -> tuple[str, int, str | None]:
    """What a stack is in, its group, and the dtype of a group's scales where it says one: `grouped:128:BF16`."""
    name, *more = kind.split(":")
    return (name, int(more[0]), more[1]) if more else (name, FOUR_BIT_GROUP, None)


def can_hold_four_bits(inputs: int, group: int = FOUR_BIT_GROUP) -> bool:
    """Whether so many inputs are whole groups in either half, as a stack of four bits is stored."""
    return inputs > 0 and inputs % (2 * group) == 0


@dataclass(frozen=True)
class ExpertLayer:
    """One MoE layer: where its experts module and its router are, and its two stacks' names and storage order.

    A stack is [E, out, in], or [E, in, out] where `is_transposed`. `sees_text` is false for experts that only image or
    sound tokens are routed to: they are stored in int8 like all others, but text cannot train them.
    """

    name: str
    up: str
    down: str
    is_transposed: bool
    num_experts: int
    router: str
    router_is_linear: bool
    sees_text: bool = True

    @property
    def stacks(self) -> tuple[str, str]:
        """Full names of both stacks."""
        return f"{self.name}.{self.up}", f"{self.name}.{self.down}"


@dataclass(frozen=True)
class Linear:
    """An `nn.Linear` and its role: what is stored in int8 and adapted, and why the others are neither.

    Int8: attention, shared, dense. As they are: head; gate (a few outputs that steer others); selector (its scores only
    choose tokens, so no gradient comes back); fused (a kernel reads its `weight` and never calls it); tower (outside
    the text decoder: an encoder of images or sound, which text cannot train).
    """

    name: str
    role: str


@dataclass(frozen=True)
class Architecture:
    """Every part that can be quantised or adapted, in model order."""

    layers: tuple[ExpertLayer, ...]
    linears: tuple[Linear, ...]

    def linear_names(self, *roles: str) -> tuple[str, ...]:
        """Names of the linears with one of these roles."""
        return tuple(linear.name for linear in self.linears if linear.role in roles)
