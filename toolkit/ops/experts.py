"""What the expert computation needs to know of an experts module, read off transformers' own description of it.

`use_experts_implementation` gives every experts module `has_gate`, `has_bias`, `is_transposed`, `_apply_gate` and so
on, so one view serves every family, whatever its stacks are stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from toolkit.architecture import expert_parameters
from toolkit.ops import four_bit
from toolkit.ops.four_bit import FourBits, kind_of
from toolkit.ops.int8 import dequantize

__all__ = ["SOURCE", "ExpertStack", "ExpertWeights", "StackSource", "expert_weights"]

SOURCE = "onecard_stacks"
"""Attribute of an experts module whose stacks are not in its parameters: the `StackSource` that has them."""

# Shapes: E experts, O outputs, I inputs of a projection, H hidden.


@dataclass(frozen=True)
class ExpertStack:
    """One projection of all experts: [E, O, I], or [E, I, O] when transposed; int8 where `scale` [E, O] is given.

    Or in four bits, [E, I/2, O] bytes and then always transposed, with what `four_bit` says of `scale` and `step`.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    is_transposed: bool
    step: torch.Tensor | None = None

    @property
    def four_bits(self) -> str | None:
        """`int4`, `mxfp4` or `grouped`; None where it is int8 or float."""
        return kind_of(self.weight, self.scale, self.step)

    @property
    def experts(self) -> int:
        """E."""
        return self.weight.shape[0]

    @property
    def outputs(self) -> int:
        """O."""
        return self.weight.shape[2 if self.is_transposed else 1]

    @property
    def inputs(self) -> int:
        """I."""
        return self.weight.shape[1 if self.is_transposed else 2] * (2 if self.four_bits else 1)

    @property
    def row_scale(self) -> torch.Tensor | None:
        """[E, O], where what is multiplied with are whole numbers; None where scales are in the weights."""
        return None if self.four_bits in ("mxfp4", "grouped") else self.scale

    def packed(self, expert: int) -> FourBits:
        """One expert of a stack of four bits."""
        assert self.scale is not None
        return FourBits(self.weight[expert], self.scale[expert], None if self.step is None else self.step[expert])

    def of(self, expert: int) -> ExpertStack:
        """The stack of this expert alone, [1, …]."""
        rows = slice(expert, expert + 1)
        mine: dict[str, Any] = {
            name: tensor if tensor is None else tensor[rows] for name, tensor in self._tensors().items()
        }
        return replace(self, **mine)

    def chosen(self, index: torch.Tensor) -> ExpertStack:
        """The stack of these experts, copied."""
        theirs: dict[str, Any] = {
            name: tensor if tensor is None else tensor.index_select(0, index)
            for name, tensor in self._tensors().items()
        }
        return replace(self, **theirs)

    def dequantized(self) -> torch.Tensor:
        """The whole stack as [E, O, I] in fp32 or wider."""
        if self.four_bits and self.scale is not None:
            return four_bit.dequantize(FourBits(self.weight, self.scale, self.step))
        weight = self.weight if self.scale is None else dequantize(self.weight, self.scale, self._input_dim)
        return weight.transpose(-1, -2) if self.is_transposed else weight

    def _tensors(self) -> dict[str, torch.Tensor | None]:
        return {"weight": self.weight, "scale": self.scale, "bias": self.bias, "step": self.step}

    @property
    def _input_dim(self) -> int:
        return -2 if self.is_transposed else -1


@dataclass(frozen=True)
class ExpertWeights:
    """All frozen parts of one expert layer. `gate` maps the first projection's output to the second's input."""

    up: ExpertStack
    down: ExpertStack
    gate: Callable[[torch.Tensor], torch.Tensor]
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None = None
    source: StackSource | None = None
    """Where both stacks' bytes are, when `up` and `down` have only their shapes."""


class StackSource(Protocol):
    """Brings the stacks of one experts module in for as long as a computation needs them."""

    def present(
        self, weights: ExpertWeights, index_TK: torch.Tensor, *, trains: bool
    ) -> AbstractContextManager[ExpertWeights]:
        """`weights` with real stacks, at least of the experts in `index_TK`; `trains` where backward will ask again."""


def expert_weights(module: nn.Module) -> ExpertWeights:
    """View an experts module as `ExpertWeights`; nothing is copied."""
    up, down = expert_parameters(module)
    return ExpertWeights(
        up=_stack(module, up),
        down=_stack(module, down),
        gate=module._apply_gate if module.has_gate else module.act_fn,  # type: ignore[arg-type]
        post_norm=module.post_expert_norm if module.has_post_expert_norm else None,  # type: ignore[arg-type]
        source=module.__dict__.get(SOURCE),
    )


def _stack(module: nn.Module, name: str) -> ExpertStack:
    return ExpertStack(
        weight=getattr(module, name),
        scale=getattr(module, f"{name}_scale", None),
        bias=getattr(module, f"{name}_bias", None) if module.has_bias else None,
        is_transposed=bool(module.is_transposed) or getattr(module, name).dtype == torch.uint8,
        step=getattr(module, f"{name}_step", None),
    )
