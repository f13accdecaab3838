"""How a rounded parameter lies in its module: the weight under its own name, its scales beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from toolkit.architecture import is_experts
from toolkit.ops import four_bit
from toolkit.ops.four_bit import FourBits
from toolkit.ops.int8 import dequantize
from toolkit.parts import FOUR_BITS, can_hold_four_bits, parsed_kind

__all__ = [
    "BESIDE",
    "EXPERT_KINDS",
    "declare_stack",
    "float_shape",
    "input_dim",
    "is_stored",
    "multiplied_out",
    "names_of",
    "rounded_in",
]

EXPERT_KINDS = ("int8", *FOUR_BITS, "source")
"""What expert stacks can be stored in: rounded, or as the checkpoint has them in four bits."""
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
BESIDE = ("", "_scale", "_step")
"""Endings of a stored parameter's name: the weight itself, its scales, and int4's steps."""


def is_stored(module: nn.Module, name: str) -> bool:
    """Whether a module's parameter is stored rounded: in int8 or four bits, with its scales beside it."""
    parameter = getattr(module, name, None)
    return parameter is not None and parameter.dtype in (torch.int8, torch.uint8) and hasattr(module, f"{name}_scale")


def names_of(module: nn.Module, name: str) -> tuple[str, ...]:
    """A stored parameter's own name and those beside it."""
    return tuple(f"{name}{ending}" for ending in BESIDE if hasattr(module, f"{name}{ending}"))


def rounded_in(state: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The stored parameters of a state dict, each with its own key and those beside it."""
    return {
        name: tuple(f"{name}{ending}" for ending in BESIDE if f"{name}{ending}" in state)
        for name, value in state.items()
        if value.dtype in (torch.int8, torch.uint8) and f"{name}_scale" in state
    }


def declare_stack(experts: nn.Module, name: str, kind: str) -> None:
    """Put empty rounded parameters in the place of a float stack.

    A stack whose inputs are no whole groups in either half stays int8.

    Args:
        kind: int8, int4, mxfp4, or what a checkpoint keeps: grouped, its group and the dtype of its scales.
    """
    stack: Tensor = getattr(experts, name)
    transposed = bool(experts.is_transposed)
    count, outputs, inputs = stack.shape[0], stack.shape[2 if transposed else 1], stack.shape[1 if transposed else 2]
    kind, group, scales = parsed_kind(kind)
    kind = kind if can_hold_four_bits(inputs, group) else "int8"
    turned, groups = (count, inputs // 2, outputs), (count, inputs // group, outputs)
    shapes: dict[str, dict[str, tuple[Sequence[int], torch.dtype]]] = {
        "int8": {"": (stack.shape, torch.int8), "_scale": ((count, outputs), torch.float32)},
        "int4": {
            "": (turned, torch.uint8),
            "_scale": ((count, outputs), torch.float32),
            "_step": (groups, torch.int8),
        },
        "mxfp4": {"": (turned, torch.uint8), "_scale": (groups, torch.uint8)},
        "grouped": {"": (turned, torch.uint8), "_scale": (groups, _DTYPES[scales or "F32"])},
    }
    for ending, (shape, dtype) in shapes[kind].items():
        empty = torch.empty(tuple(shape), dtype=dtype, device=stack.device)
        setattr(experts, f"{name}{ending}", nn.Parameter(empty, requires_grad=False))


def input_dim(module: nn.Module) -> int:
    """The dimension of a float weight that a scale is shared along."""
    return -2 if is_experts(module) and module.is_transposed else -1


def float_shape(module: nn.Module, name: str) -> torch.Size:
    """The shape that a parameter has as the family declares it."""
    parameter: Tensor = getattr(module, name)
    if parameter.dtype != torch.uint8 or not is_stored(module, name):
        return parameter.shape
    count, half, outputs = parameter.shape
    return torch.Size((count, 2 * half, outputs) if module.is_transposed else (count, outputs, 2 * half))


def multiplied_out(parts: Mapping[str, Tensor], name: str, *, is_transposed: bool) -> Tensor:
    """A stored parameter in fp32, in the order of the family's float one.

    Args:
        parts: tensors by name, among them this one's.
    """
    weight, scale = parts[name], parts[f"{name}_scale"]
    if weight.dtype == torch.int8:
        return dequantize(weight, scale, -2 if is_transposed else -1)
    whole = four_bit.dequantize(FourBits(weight, scale, parts.get(f"{name}_step")))
    return whole.transpose(-1, -2) if is_transposed else whole
