"""A model on a device: how many bytes a recipe takes there, asked as often as a search needs.

The skeleton's shapes are read once; a step is rehearsed once for each choice that changes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.architecture import Architecture, describe
from toolkit.errors import first_line
from toolkit.plan.devices import Device
from toolkit.plan.memory import Bytes, StepShape, count_bytes, count_step, stack_bytes
from toolkit.plan.place import share_of, spread
from toolkit.plan.shapes import shape_of
from toolkit.recipe import Recipe

__all__ = ["Budget"]

_HOST_SHARE = 0.8
"""Of a host's memory that pinned expert stacks may take."""


@dataclass
class Budget:
    """Sizes of one model under one device, dtype and backend."""

    name: str
    revision: str
    device: Device
    dtype: torch.dtype
    backend: str
    attn: str
    counts_steps: bool = True
    shape: StepShape | None = None
    """Longest sequence and labels of the data at hand; without it every position of `max_length` carries a label."""
    note: str = ""
    """Why activations are estimated, where they are not counted."""
    _held: dict[Any, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model: PreTrainedModel = self._skeleton()
        self.architecture: Architecture = describe(self.model)

    def _skeleton(self) -> PreTrainedModel:
        return shape_of(self.name, self.revision, self.attn)

    @property
    def layers(self) -> tuple[str, ...]:
        """MoE layers' names."""
        return tuple(layer.name for layer in self.architecture.layers)

    def bytes(self, recipe: Recipe, placement: Mapping[str, str] | None = None) -> Bytes:
        """Of a recipe with rank and length decided; all stacks resident where no placement is given."""
        return count_bytes(
            self.model,
            self.architecture,
            recipe,
            placement or spread(dict.fromkeys(self.layers, 0), 0, "resident"),
            device=self.device.kind,
            itemsize=self.dtype.itemsize,
            step=self.step(recipe) if self.counts_steps else 0,
        )

    def fits(self, recipe: Recipe, placement: Mapping[str, str] | None = None) -> bool:
        """Whether the device has the bytes."""
        return self.bytes(recipe, placement).total <= self.device.memory

    def place(self, recipe: Recipe) -> dict[str, str]:
        """MoE layer to resident, host or disk: what the recipe says, or the fewest streamed layers that make it fit."""
        wanted, sizes = recipe.placement, self._stacks(recipe)
        is_int8 = recipe.quantization.experts == "int8"
        if wanted.experts == "resident" or not is_int8:
            return spread(sizes, 0, "resident")
        if wanted.share is not None:
            count = share_of(sizes, wanted.share)
            return spread(sizes, count, self._place(wanted.experts, sizes, count))
        for count in range(len(sizes) + 1):
            placement = spread(sizes, count, self._place(wanted.experts, sizes, count))
            if self.fits(recipe, placement):
                return placement
        return spread(sizes, 0, "resident") if wanted.experts == "auto" else placement

    def step(self, recipe: Recipe) -> int:
        """Most bytes of gradients and activations in a step."""
        shape = self.shape_for(recipe)
        training, lora = recipe.training, recipe.lora
        key = (
            shape, training.per_device_train_batch_size, training.gradient_checkpointing, training.packing,
            training.router_aux_loss_coef == 0, lora.model_dump_json(), recipe.quantization.model_dump_json(),
        )  # fmt: skip
        if key not in self._held:
            self._held[key] = self._count(recipe, shape)
        return self._held[key]

    def shape_for(self, recipe: Recipe) -> StepShape:
        """What the data need, and no more than the recipe's length."""
        length = recipe.training.max_length
        assert isinstance(length, int)
        if self.shape is None:
            return StepShape(length, length - 1 if length > 1 else 1)
        return StepShape(min(self.shape.length, length), min(self.shape.labelled, length))

    def _count(self, recipe: Recipe, shape: StepShape) -> int:
        try:
            return count_step(
                self._skeleton(), recipe, shape, device=self.device.kind, dtype=self.dtype, backend=self.backend
            )
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError) as error:
            # A family whose forward asks tensors for numbers cannot be rehearsed; it can still be trained.
            self.note = f"activations estimated: this family's step cannot be rehearsed ({first_line(error)[:80]})"
            return _estimate(self.model, recipe, shape, self.dtype.itemsize)

    def _stacks(self, recipe: Recipe) -> dict[str, int]:
        return stack_bytes(self.model, self.architecture, recipe.quantization.experts, self.dtype.itemsize)

    def _place(self, wanted: str, sizes: Mapping[str, int], count: int) -> str:
        if wanted != "auto":
            return wanted
        if self.device.kind == "cpu":
            return "disk"
        need = count * max(sizes.values(), default=0)
        has_room = self.device.host_memory is None or need <= _HOST_SHARE * self.device.host_memory
        return "host" if has_room else "disk"


def _estimate(model: nn.Module, recipe: Recipe, shape: StepShape, itemsize: int) -> int:
    """By rule of thumb: 34 values a token and hidden unit in a layer (Korthikanti et al. 2022), 2 where recomputed."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    tokens = shape.length * recipe.training.per_device_train_batch_size
    a_layer = tokens * config.hidden_size * itemsize
    kept = config.num_hidden_layers * (2 if recipe.training.gradient_checkpointing else 34) + 34
    return int(a_layer * kept + 12 * tokens * config.vocab_size)
