"""Recipe + config + device -> a frozen `Plan`: what will be loaded where, adapted how, and how many bytes it takes.

No weights are read; the model is built on the meta device from its config. Every size is counted on real shapes, so what
the plan says can be held against what a run measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit.architecture import Architecture, describe, skeleton
from toolkit.errors import ModelError, RecipeError, ResourceError, did_you_mean
from toolkit.recipe import Recipe

__all__ = ["BACKENDS", "Bytes", "Plan", "device_memory", "make_plan"]

BACKENDS: Mapping[str, str] = {"cpu": "onecard_per_expert", "cuda": "onecard_per_expert"}
"""The expert backend of each device type, by the name it is registered under."""

_LINEARS_8BIT = ("attention", "shared", "dense")


@dataclass(frozen=True)
class Bytes:
    """Bytes of everything that stays in memory during training; activations come on top."""

    experts: int
    linears: int
    other: int
    adapter: int
    optimizer: int
    gradients: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """What a run will do, decided before any weight is read."""

    recipe: Recipe
    model: str
    device: str
    dtype: str
    backend: str
    architecture: Architecture
    bytes: Bytes
    memory: int
    folder: Path

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype as torch names it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; no local paths but the model's own name."""
        layers = self.architecture.layers
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "backend": self.backend,
            "moe_layers": len(layers),
            "experts_per_layer": sorted({layer.num_experts for layer in layers}),
            "bytes": {**asdict(self.bytes), "total": self.bytes.total},
            "memory": self.memory,
        }


def make_plan(recipe: Recipe) -> Plan:
    """Decide device, dtype and backend, enumerate the model, count its bytes, refuse what cannot work.

    Raises:
        ModelError: not an MoE, unknown family, missing folder. RecipeError: a setting that cannot be honoured here.
        ResourceError: what must be resident exceeds the memory there is.
    """
    if recipe.mtp.enabled:
        raise RecipeError("mtp.enabled: this version trains no multi-token-prediction head; remove the line")
    device = "cuda" if torch.cuda.is_available() and not recipe.training.use_cpu else "cpu"
    name = recipe.model.model_name_or_path
    _refuse_missing_folder(name)
    model = skeleton(name, revision=recipe.model.revision)
    architecture = describe(model)
    dtype = _dtype(recipe.model.dtype, device)
    sizes = _count(model, architecture, recipe, getattr(torch, dtype).itemsize)
    memory = device_memory(device)
    if sizes.total > memory:
        raise ResourceError(
            f"{recipe.model.model_name_or_path}: needs {sizes.total / 2**30:.1f} GiB before activations, {device} has "
            f"{memory / 2**30:.1f} GiB; lower lora.r or take a smaller model"
        )
    return Plan(recipe, name, device, dtype, BACKENDS[device], architecture, sizes, memory, Path(recipe.training.output_dir))


def _refuse_missing_folder(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: no config.json in this folder; give a transformers checkpoint")
    elif path.exists():
        raise ModelError(f"{name}: a file; give the checkpoint's folder")
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings)
        raise ModelError(f"{name}: no such folder, and not a Hub name (owner/name){hint}")


def _dtype(wanted: str, device: str) -> str:
    if wanted != "auto":
        return wanted
    return "bfloat16" if device == "cuda" else "float32"


def device_memory(device: str) -> int:
    """Bytes of the device: the card's, or the machine's RAM (the cgroup's share of it)."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    pages = Path("/proc/meminfo").read_text(encoding="ascii").split("MemTotal:")[1].split()[0]
    limit = Path("/sys/fs/cgroup/memory.max")
    bounded = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    total = int(pages) * 1024
    return min(total, int(bounded)) if bounded.isdigit() else total


def _count(model: nn.Module, architecture: Architecture, recipe: Recipe, itemsize: int) -> Bytes:
    stacks = [
        getattr(model.get_submodule(layer.name), stack) for layer in architecture.layers for stack in (layer.up, layer.down)
    ]
    linears = [model.get_submodule(name).weight for name in architecture.linear_names(*_LINEARS_8BIT)]
    total = sum(p.numel() for p in model.parameters())
    experts, dense = sum(p.numel() for p in stacks), sum(p.numel() for p in linears)
    adapter = _adapter_parameters(model, architecture, recipe)
    states = 2 if "8bit" in recipe.training.optim else 8
    return Bytes(
        experts=_stored(experts, [p.shape[0] * max(p.shape[1:]) for p in stacks], recipe.quantization.experts, itemsize),
        linears=_stored(dense, [p.shape[0] for p in linears], recipe.quantization.linears, itemsize),
        other=(total - experts - dense) * itemsize,
        adapter=4 * adapter,
        optimizer=states * adapter,
        gradients=4 * adapter,
    )


def _stored(parameters: int, rows: list[int], how: str, itemsize: int) -> int:
    return parameters * itemsize if how == "none" else parameters + 4 * sum(rows)


def _adapter_parameters(model: nn.Module, architecture: Architecture, recipe: Recipe) -> int:
    lora = recipe.lora
    total = 0
    for layer in architecture.layers:
        rank = lora.rank_pattern.get("experts", lora.r)
        for stack in (layer.up, layer.down):
            shape = getattr(model.get_submodule(layer.name), stack).shape
            total += layer.num_experts * rank * sum(shape[1:]) if lora.experts else 0
        if lora.router:
            total += lora.rank_pattern.get("router", lora.r) * sum(model.get_submodule(layer.router).weight.shape)
    roles = {"attention": ("attention",), "all-linear": _LINEARS_8BIT, "none": ()}
    wanted = lora.target_modules
    for linear in architecture.linears:
        leaf = linear.name.rpartition(".")[2]
        if linear.role in roles[wanted] if isinstance(wanted, str) else leaf in wanted or linear.name in wanted:
            rank = lora.rank_pattern.get(leaf, lora.r)
            total += rank * sum(model.get_submodule(linear.name).weight.shape)
    return total


