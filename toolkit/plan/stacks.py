"""Bytes of the expert stacks, whatever each is in, and the layers that a budget of bytes lets be int8 instead of int4.

Which layers these are, the loss decides once weights are read (`toolkit.quant.gains`). Until then a plan knows how many
they are, and counts them where they cost most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from toolkit.errors import ModelError, RecipeError
from toolkit.offload.place import resident_bytes, streamed
from toolkit.parts import FOUR_BITS, can_hold_four_bits, parsed_kind
from toolkit.plan.shapes import Shapes
from toolkit.recipe.sizes import size_of, size_text

__all__ = [
    "Choice",
    "Mixture",
    "bytes_of_stack",
    "mixture_of",
    "room_for_stacks",
    "rounded_bytes",
    "stack_bytes",
    "with_budget",
    "with_stacks",
]

_SCALES = {None: 1, "F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Mixture:
    """Stacks of a budget: how many are in what, bits of a weight with its scales, and whether it is known which."""

    stacks: Mapping[str, int]
    bits: float
    is_chosen: bool

    def __str__(self) -> str:
        counts = ", ".join(f"{kind} {count}" for kind, count in self.stacks.items())
        later = "" if self.is_chosen else "; the loss decides which, measured before step 1"
        return f"expert stacks {counts} of {sum(self.stacks.values())}; {self.bits:.1f} bits a weight{later}"


@dataclass(frozen=True)
class Choice:
    """Layers that may be int8 instead of int4: bytes that each then takes more, and bytes that there are for it.

    Args:
        plain: MoE layer to its stacks, each to what it is in where the layer is not chosen.
        extra: layer to bytes, of those that differ at all.
        room: bytes beyond those of all layers in int4.
    """

    plain: Mapping[str, Mapping[str, str]]
    extra: Mapping[str, int]
    room: int

    def taken(self, order: Iterable[str]) -> tuple[str, ...]:
        """Layers in this order, each that still fits."""
        left, found = self.room, []
        for layer in order:
            if self.extra[layer] <= left:
                left -= self.extra[layer]
                found.append(layer)
        return tuple(found)

    def by_gain(self, gains: Mapping[str, float]) -> tuple[str, ...]:
        """The layers that gain most for a byte, each that still fits; of equals the first."""
        return self.taken(sorted(self.extra, key=lambda layer: -gains[layer] / self.extra[layer]))

    def kinds(self, chosen: Collection[str]) -> dict[str, str]:
        """Every stack to what it is in."""
        return {
            name: "int8" if layer in chosen else kind
            for layer, stacks in self.plain.items()
            for name, kind in stacks.items()
        }


def with_budget(shapes: Shapes, text: str) -> tuple[Shapes, Choice | None, str]:
    """Shapes under a recipe's budget, what is left to choose, and a word on a budget that leaves nothing to choose.

    Raises:
        RecipeError: all layers in int4 take more.
    """
    choice = _choice(shapes, size_of(text))
    least = size_of(text) - choice.room
    if choice.room < 0:
        raise RecipeError(
            f"quantization.budget: {text}: with every layer in int4 the expert stacks take {size_text(least)}; give "
            "that or more"
        )
    fitting = choice.taken(sorted(choice.extra, key=lambda layer: choice.extra[layer]))
    if 0 < len(fitting) < len(choice.extra):
        return replace(shapes, budget=size_of(text)), choice, ""
    note = (
        f"quantization.budget: {text} holds every expert stack in int8, {size_text(least + sum(choice.extra.values()))}"
    )
    if choice.extra and not fitting:
        note = (
            f"quantization.budget: {text} holds no layer in int8, {size_text(least + min(choice.extra.values()))} one"
        )
    return replace(shapes, stacks=choice.kinds(fitting)), None, note


def with_stacks(shapes: Shapes, stacks: Mapping[str, str]) -> Shapes:
    """Shapes with a mixture that was chosen before.

    Raises:
        ModelError: it is one of another model.
    """
    choice = _choice(shapes, 0)
    chosen = [layer for layer in choice.extra if all(stacks.get(name) == "int8" for name in choice.plain[layer])]
    if dict(stacks) != choice.kinds(chosen):
        raise ModelError(
            "quantization.budget: the layers recorded as int8 are not this model's; give the run's own base"
        )
    return replace(shapes, stacks=dict(stacks))


def mixture_of(shapes: Shapes) -> Mixture:
    """What the stacks of a budget are in; where that is open, how many will be."""
    kinds = shapes.stacks
    if shapes.budget is not None:
        choice = _choice(shapes, shapes.budget)
        kinds = choice.kinds(choice.taken(choice.extra))
    weights = sum(math.prod(shapes.parameters[name]) for name in kinds)
    bits = 8 * sum(stack_bytes(shapes, "int4", 0).values()) / weights
    return Mixture(dict(sorted(Counter(kinds.values()).items())), bits, shapes.budget is None)


def stack_bytes(shapes: Shapes, how: str, itemsize: int, first: Collection[str] = ()) -> dict[str, int]:
    """MoE layer to the bytes of its two stacks, scales included.

    Args:
        first: layers that are taken to be int8 before others, as many as the budget holds, where that is open.
    """
    if shapes.budget is None:
        return _bytes_by_layer(shapes, how, itemsize)
    choice, small = _choice(shapes, shapes.budget), _bytes_by_layer(shapes, "int4", itemsize)
    chosen = choice.taken(sorted(choice.extra, key=lambda layer: layer not in first))
    return {layer: size + (choice.extra[layer] if layer in chosen else 0) for layer, size in small.items()}


def room_for_stacks(shapes: Shapes, how: str, itemsize: int, placement: Mapping[str, str]) -> tuple[int, int]:
    """Bytes of the stacks that stay on the device, and of slots for others, the most that an open choice may need."""
    away = streamed(placement)
    resident = [name for name in placement if name not in away]
    staying, slots = resident_bytes(stack_bytes(shapes, how, itemsize, resident), placement)
    return staying, max(slots, resident_bytes(stack_bytes(shapes, how, itemsize, away), placement)[1])


def bytes_of_stack(size: int, rows: int, how: str, itemsize: int) -> int:
    """Of a stack's parameters and output rows: four bits, a byte or a scale a group, and a scale a row for int4."""
    kind, group, scales = parsed_kind(how)
    if kind not in (*FOUR_BITS, "grouped") or not can_hold_four_bits(size // rows, group):
        return rounded_bytes([(size, rows)], "none" if how == "none" else "int8", itemsize)
    return size // 2 + _SCALES[scales] * size // group + (4 * rows if kind == "int4" else 0)


def rounded_bytes(parts: list[tuple[int, int]], how: str, itemsize: int) -> int:
    """Bytes of (parameters, output rows): int8 and a fp32 scale a row, or the compute dtype."""
    return sum(size * itemsize if how == "none" else size + 4 * rows for size, rows in parts)


def _choice(shapes: Shapes, budget: int) -> Choice:
    bare = replace(shapes, stacks={}, budget=None)
    small, large = (_bytes_by_layer(bare, how, 0) for how in ("int4", "int8"))
    plain = {
        layer.name: {
            name: _plain_kind(shapes.parameters[name], is_transposed=layer.is_transposed) for name in layer.stacks
        }
        for layer in shapes.architecture.layers
    }
    extra = {name: large[name] - size for name, size in small.items() if large[name] > size}
    return Choice(plain, extra, budget - sum(small.values()))


def _plain_kind(shape: tuple[int, ...], *, is_transposed: bool) -> str:
    return "int4" if can_hold_four_bits(shape[1 if is_transposed else 2]) else "int8"


def _bytes_by_layer(shapes: Shapes, how: str, itemsize: int) -> dict[str, int]:
    result = {}
    for layer in shapes.architecture.layers:
        axis = 2 if layer.is_transposed else 1
        result[layer.name] = sum(
            bytes_of_stack(math.prod(shape), shape[0] * shape[axis], shapes.stacks.get(name, how), itemsize)
            for name, shape in ((name, shapes.parameters[name]) for name in layer.stacks)
        )
    return result
