"""Recipe + config + device -> a frozen `Plan`: what will be loaded where, adapted how, and how many bytes it takes.

No weights are read; the model is built on the meta device from its config. Every size is counted on real shapes, so
what the plan says can be held against what a run measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from toolkit.architecture import LINEAR_ROLES, Architecture, describe, skeleton
from toolkit.errors import ModelError, RecipeError, ResourceError, did_you_mean
from toolkit.plan.audit import check_shards
from toolkit.plan.formats import declared_format
from toolkit.plan.head import head_bytes
from toolkit.recipe import Recipe

__all__ = ["BACKENDS", "ROUNDED_ROWS", "Bytes", "Plan", "device_memory", "make_plan"]

BACKENDS: Mapping[str, str] = {
    "cpu": "onecard_per_expert",
    "cuda": "onecard_triton" if find_spec("triton") else "onecard_per_expert",
}
"""The expert backend of each device type, by the name it is registered under."""

ROUNDED_ROWS = "onecard_triton_w8a8"
"""The backend that rounds rows to int8 as well."""


@dataclass(frozen=True)
class Bytes:
    """Bytes of everything that stays in memory during training; activations come on top."""

    experts: int
    linears: int
    other: int
    adapter: int
    optimizer: int
    gradients: int
    mtp: int = 0

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
    if recipe.mtp.depth < recipe.mtp.num_mtp_layers:
        raise RecipeError(
            "mtp.depth: must be at least mtp.num_mtp_layers, since each layer is trained at its own depth"
        )
    for tracker in recipe.tracking.report_to:
        if find_spec(tracker) is None:
            raise RecipeError(f"tracking.report_to: {tracker} is not installed; pip install {tracker}")
    device = "cuda" if torch.cuda.is_available() and not recipe.training.use_cpu else "cpu"
    backend = _backend(recipe, device)
    name = recipe.model.model_name_or_path
    _check_folder(name)
    model = skeleton(name, revision=recipe.model.revision)
    declared_format(name, model.config)
    architecture = describe(model)
    dtype = _dtype(recipe.model.dtype, device)
    sizes = _count(model, architecture, recipe, getattr(torch, dtype).itemsize)
    memory = device_memory(device)
    if sizes.total > memory:
        raise ResourceError(
            f"{recipe.model.model_name_or_path}: needs {sizes.total / 2**30:.1f} GiB before activations, {device} has "
            f"{memory / 2**30:.1f} GiB; lower lora.r or take a smaller model"
        )
    return Plan(recipe, name, device, dtype, backend, architecture, sizes, memory, Path(recipe.training.output_dir))


def _backend(recipe: Recipe, device: str) -> str:
    if device != "cuda" and recipe.training.activation_offloading:
        raise RecipeError("training.activation_offloading: activations are in host memory already; remove the line")
    if recipe.quantization.activations == "none":
        return BACKENDS[device]
    if device != "cuda" or not find_spec("triton"):
        raise RecipeError("quantization.activations: int8 rows need a CUDA card and Triton; set it to none")
    return ROUNDED_ROWS


def _check_folder(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: no config.json in this folder; give a transformers checkpoint")
        check_shards(path)
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


def _count(model: PreTrainedModel, architecture: Architecture, recipe: Recipe, itemsize: int) -> Bytes:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    outputs = {name: 2 if layer.is_transposed else 1 for layer in architecture.layers for name in layer.stacks}
    stacks = [(math.prod(shapes[name]), shapes[name][0] * shapes[name][axis]) for name, axis in outputs.items()]
    names = architecture.linear_names(*LINEAR_ROLES)
    linears = [(math.prod(shapes[f"{name}.weight"]), shapes[f"{name}.weight"][0]) for name in names]
    rest = sum(math.prod(shape) for shape in shapes.values()) - sum(size for size, _ in [*stacks, *linears])
    adapter = _adapter_parameters(shapes, architecture, recipe)
    return Bytes(
        experts=_stored(stacks, recipe.quantization.experts, itemsize),
        linears=_stored(linears, recipe.quantization.linears, itemsize),
        other=rest * itemsize,
        adapter=4 * adapter,
        optimizer=(2 if "8bit" in recipe.training.optim else 8) * adapter,
        gradients=4 * adapter,
        mtp=head_bytes(model, model.config.get_text_config(), recipe.mtp.num_mtp_layers) if recipe.mtp.enabled else 0,
    )


def _stored(parts: list[tuple[int, int]], how: str, itemsize: int) -> int:
    """Bytes of (parameters, output rows): int8 and a fp32 scale a row, or the compute dtype."""
    return sum(size * itemsize if how == "none" else size + 4 * rows for size, rows in parts)


def _adapter_parameters(shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, recipe: Recipe) -> int:
    lora, total = recipe.lora, 0
    for layer in (layer for layer in architecture.layers if layer.sees_text):
        rank = lora.rank_pattern.get("experts", lora.r)
        total += sum(layer.num_experts * rank * sum(shapes[name][1:]) for name in layer.stacks if lora.experts)
        if lora.router:
            total += lora.rank_pattern.get("router", lora.r) * sum(shapes[f"{layer.router}.weight"])
    roles = {"attention": ("attention",), "all-linear": LINEAR_ROLES, "none": ()}
    wanted = lora.target_modules
    for linear in architecture.linears:
        leaf = linear.name.rpartition(".")[2]
        if linear.role in roles[wanted] if isinstance(wanted, str) else {leaf, linear.name} & set(wanted):
            total += lora.rank_pattern.get(leaf, lora.r) * sum(shapes[f"{linear.name}.weight"])
    return total
