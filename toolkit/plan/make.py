"""Recipe + config + device -> a frozen `Plan`: what will be loaded where, adapted how, and how many bytes it takes.

No weights are read; the model is built on the meta device from its config. Every size is counted on real shapes, so
what the plan says can be held against what a run measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.files import gguf_at
from toolkit.errors import ModelError, PackingError, RecipeError, ResourceError, did_you_mean
from toolkit.families import SEE_EACH_OTHER_PACKED
from toolkit.offload.place import streamed
from toolkit.parts import Architecture
from toolkit.plan.budget import Budget
from toolkit.plan.devices import Device, this_device
from toolkit.plan.duration import Duration, measured_passes
from toolkit.plan.fit import Change, cheapest_changes, settle
from toolkit.plan.kept import shapes_for
from toolkit.plan.memory import Bytes
from toolkit.plan.stacks import Choice, Mixture, mixture_of, stack_bytes
from toolkit.plan.steps import StepShape
from toolkit.plan.stored import Stored, what_is_stored
from toolkit.processes import processes
from toolkit.recipe import SCHEDULE_FREE, Recipe

if TYPE_CHECKING:
    import torch

__all__ = ["PER_EXPERT", "ROUNDED_ROWS", "TRITON", "Plan", "default_backend", "default_dtype", "make_plan"]

PER_EXPERT, TRITON = "onecard_per_expert", "onecard_triton"
"""The expert backends by the names they are registered under (`toolkit.ops`): any device, cards with Triton."""

_TENSOR_CORES = (8, 0)
"""Compute capability from which Triton multiplies 16-bit numbers on tensor cores, and bfloat16 is more than an
emulation (docs/cards.md)."""
_WORTH_TELLING = 256 << 20
"""Bytes in use by other programs from which they are named."""

ROUNDED_ROWS = "onecard_triton_w8a8"
"""The backend that rounds rows to int8 as well."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do, decided before any weight is read."""

    recipe: Recipe
    """With rank, length and packing decided."""
    rank: int
    """Of the adapter."""
    max_length: int
    """Tokens of the longest training sequence there may be."""
    model: str
    device: str
    dtype: str
    backend: str
    architecture: Architecture
    bytes: Bytes
    memory: int
    """Bytes that the run can have of the device."""
    folder: Path
    placement: Mapping[str, str] = field(default_factory=dict)
    """MoE layer module name to where its expert stacks live: resident, host or disk."""
    stacks: Mapping[str, str] = field(default_factory=dict)
    """Expert stack to what it is in, where a budget decides it and that is known."""
    choice: Choice | None = None
    """What a budget leaves to the loss, until it is measured (`toolkit.run.choose_stacks`)."""
    mixture: Mixture | None = None
    """Of a budget, how many stacks are in what."""
    micro_batches_per_pass: int = 1
    """Micro-batches that go through a streamed layer before the next."""
    device_name: str = ""
    taken: int = 0
    """Bytes of the device that other programs hold."""
    length: int = 0
    """Tokens of the sequence that `bytes` are for: the longest of the data where they were looked at."""
    labelled: int = 0
    duration: Duration | None = None
    """Of an optimizer step, on a card whose rates are known."""
    disk: Mapping[str, int] = field(default_factory=dict)
    """Bytes on the disk by what they are."""
    stored: Stored | None = None
    """The checkpoint as it is on the disk or the Hub, from its headers where they could be read."""
    changes: tuple[Change, ...] = ()
    """The cheapest ones that make it fit, where it does not."""
    notes: tuple[str, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype as torch names it."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def fits(self) -> bool:
        """Whether the device has the bytes."""
        return self.bytes.total <= self.memory

    def require_fit(self) -> None:
        """Raise `ResourceError` with the cheapest change where the device lacks the bytes."""
        if self.fits:
            return
        advice = f"; cheapest: {self.changes[0].what}" if self.changes else "; take a smaller model or a larger device"
        taken = f" free, others use {self.taken / 2**30:.1f} GiB" if self.taken >= _WORTH_TELLING else ""
        raise ResourceError(
            f"{self.model}: training needs {self.bytes.total / 2**30:.1f} GiB, {self.device_name or self.device} has "
            f"{self.memory / 2**30:.1f} GiB{taken}{advice}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; no local paths but the model's own name."""
        layers = self.architecture.layers
        return {
            "model": self.model,
            "device": self.device,
            "device_name": self.device_name,
            "dtype": self.dtype,
            "backend": self.backend,
            "moe_layers": len(layers),
            "experts_per_layer": sorted({layer.num_experts for layer in layers}),
            "r": self.recipe.lora.r,
            "length": self.length,
            "labelled": self.labelled,
            "bytes": {**asdict(self.bytes), "total": self.bytes.total},
            "memory": self.memory,
            "fits": self.fits,
            "mixture": asdict(self.mixture) if self.mixture else None,
            "placement": dict(self.placement),
            "streamed_layers": len(streamed(self.placement)),
            "micro_batches_per_pass": self.micro_batches_per_pass,
            "step_seconds": self.duration.to_dict() if self.duration else None,
            "disk": dict(self.disk),
            "stored": asdict(self.stored) if self.stored else None,
            "changes": [asdict(change) for change in self.changes],
            "notes": list(self.notes),
        }


def make_plan(
    recipe: Recipe,
    *,
    device: Device | None = None,
    shape: StepShape | None = None,
    for_training: bool = True,
    stacks: Mapping[str, str] | None = None,
) -> Plan:
    """Decide device, dtype, backend and placement, enumerate the model, count its bytes, refuse what cannot work.

    Args:
        device: another one than this machine's. shape: the data's longest sequence, where they were looked at.
        for_training: whether a training step is rehearsed and counted; evaluation needs none.
        stacks: what each expert stack is in, where the recipe's budget was chosen for before.

    Raises:
        ModelError: not an MoE, unknown family, missing folder. RecipeError: a setting that cannot be honoured here.
        ResourceError: the weights alone exceed the memory there is.

    Packing that was not asked for is off where the model's layers cannot keep packed examples apart.
    """
    _check_settings(recipe)
    device = device or this_device(recipe.training.use_cpu)
    try:
        return _planned(recipe, device, shape, for_training, stacks)
    except PackingError as error:
        if "packing" in recipe.training.model_fields_set:
            raise RecipeError(f"training.packing: {error}; set training.packing=false") from None
        training = recipe.training.model_copy(update={"packing": False})
        unpacked = recipe.model_copy(update={"training": training})
        made = _planned(unpacked, device, shape, for_training, stacks)
        return replace(made, notes=(f"training.packing: false, {error}", *made.notes))


def _planned(
    recipe: Recipe,
    device: Device,
    shape: StepShape | None,
    for_training: bool,
    stacks: Mapping[str, str] | None,
) -> Plan:
    """The plan. Raises what `make_plan` does, and `PackingError` where a step cannot be packed."""
    name, revision = recipe.model.model_name_or_path, recipe.model.revision
    backend = _backend(recipe, device)
    _check_name(name, recipe.model.tokenizer_name_or_path)
    dtype = default_dtype(device) if recipe.model.dtype == "auto" else recipe.model.dtype
    budget = Budget(name, revision, device, dtype, backend, recipe.model.attn_implementation, for_training, shape)
    if recipe.training.packing and for_training and budget.model_types & SEE_EACH_OTHER_PACKED:
        raise PackingError("packed examples would see each other in this family")
    stored = what_is_stored(budget)
    kinds = shapes_for(budget, recipe.quantization, is_ours=stored.is_int8, stacks=stacks)
    budget.shapes, choice, held = kinds
    if recipe.placement.embedding == "host" and device.kind == "cuda":
        from toolkit.offload.embedding import check_table

        check_table(budget.model)
    recipe, notes = settle(recipe, budget)
    placement = budget.place(recipe)
    sizes, chosen = budget.bytes(recipe, placement), budget.shape_for(recipe)
    per_pass = budget.micro_batches_per_pass(recipe, placement)
    made = Plan(
        recipe=recipe,
        rank=int(recipe.lora.r),
        max_length=int(recipe.training.max_length),
        model=name,
        device=device.kind,
        dtype=dtype,
        backend=backend,
        architecture=budget.shapes.architecture,
        bytes=sizes,
        memory=device.free,
        taken=device.taken,
        folder=Path(recipe.training.output_dir),
        placement=placement,
        **_of_budget(recipe, budget, choice),
        micro_batches_per_pass=per_pass,
        device_name=device.name,
        length=chosen.length,
        labelled=chosen.labelled,
        duration=budget.duration(recipe, placement, per_pass),
        disk=_disk(budget, recipe, sizes, placement, stored),
        stored=stored,
    )
    changes = cheapest_changes(recipe, budget) if for_training and not made.fits else ()
    told = (*notes, *_about(device, dtype), *filter(None, [held, _on_measuring(choice), budget.note, stored.note]))
    return replace(made, changes=changes, notes=told)


def _of_budget(recipe: Recipe, budget: Budget, choice: Choice | None) -> dict[str, Any]:
    """Those fields of a `Plan`."""
    if recipe.quantization.budget is None:
        return {}
    return {"stacks": dict(budget.shapes.stacks), "choice": choice, "mixture": mixture_of(budget.shapes)}


def _on_measuring(choice: Choice | None) -> str:
    if choice is None:
        return ""
    return (
        f"quantization.budget: before step 1 the loss is measured with each of {len(choice.extra)} layers in int8, in "
        f"about {measured_passes(len(choice.plain)):.0f} passes over the calibration examples"
    )


def default_dtype(device: Device) -> str:
    """What `model.dtype: auto` is there."""
    if device.kind != "cuda":
        return "float32"
    return "float16" if _is_before_tensor_cores(device) else "bfloat16"


def default_backend(device: Device) -> str:
    """The expert backend there: torch for a card comes with Triton, so a card elsewhere is taken to have it."""
    if device.kind != "cuda" or _is_before_tensor_cores(device) or (device.is_here and not find_spec("triton")):
        return PER_EXPERT
    return TRITON


def _is_before_tensor_cores(device: Device) -> bool:
    return device.kind == "cuda" and device.capability is not None and device.capability < _TENSOR_CORES


def _about(device: Device, dtype: str) -> Iterator[str]:
    """What there is to say about the device itself."""
    if device.visible > 1 and processes() == 1:
        yield (
            f"{device.visible} cards are visible, only the first is used; CUDA_VISIBLE_DEVICES chooses another, "
            "accelerate launch uses several"
        )
    if device.taken >= _WORTH_TELLING:
        yield f"other programs hold {device.taken / 2**30:.1f} of the card's {device.memory / 2**30:.1f} GiB"
    if _is_before_tensor_cores(device):
        number = "sm_{}{}".format(*device.capability or ())
        slow = "; model.dtype=bfloat16 is emulated there, float16 is not" if dtype == "bfloat16" else ""
        yield f"{number}: experts run one by one, Triton needs sm_80 for 16-bit tensor cores{slow}"


def _check_settings(recipe: Recipe) -> None:
    if recipe.mtp.depth < recipe.mtp.num_mtp_layers:
        raise RecipeError(
            "mtp.depth: must be at least mtp.num_mtp_layers, since each layer is trained at its own depth"
        )
    if recipe.mtp.loss_weight and recipe.mtp.stage != "with":
        raise RecipeError("mtp.loss_weight: it needs head and adapter to train together; set mtp.stage=with")
    if recipe.training.optim == SCHEDULE_FREE and find_spec("schedulefree") is None:
        raise RecipeError("training.optim: schedulefree is not installed; pip install schedulefree")
    for tracker in recipe.tracking.report_to:
        if find_spec(tracker) is None:
            raise RecipeError(f"tracking.report_to: {tracker} is not installed; pip install {tracker}")


def _disk(budget: Budget, recipe: Recipe, sizes: Bytes, placement: Mapping[str, str], stored: Stored) -> dict[str, int]:
    """The download, the int8 file that streams from the disk, checkpoints kept and the one being written."""
    away = [name for name in streamed(placement) if placement[name] == "disk"]
    on_disk = sum(budget.stacks(recipe, away)[name] for name in away)
    if budget.shapes.budget is not None:  # the loss is measured with all of them in int4
        plain = stack_bytes(replace(budget.shapes, budget=None), "int4", budget.itemsize)
        on_disk += sum(plain[name] for name in away)
    checkpoint = sizes.adapter + sizes.optimizer
    return {
        "download": 0 if stored.is_here else stored.bytes,
        "int8 file": 0 if stored.is_int8 else on_disk,
        "checkpoints": (recipe.training.save_total_limit + 1) * checkpoint,
        "artifact": sizes.adapter,
    }


def _backend(recipe: Recipe, device: Device) -> str:
    if device.kind != "cuda" and recipe.training.activation_offloading:
        raise RecipeError("training.activation_offloading: activations are in host memory already; remove the line")
    if recipe.quantization.activations == "none":
        return default_backend(device)
    if default_backend(device) != TRITON:
        raise RecipeError("quantization.activations: int8 needs Triton and a CUDA card, sm_80 or newer; set it to none")
    return ROUNDED_ROWS


def _check_name(name: str, tokenizer: str | None) -> None:
    if found := gguf_at(name):
        from toolkit.checkpoint.gguf_source import require_tokenizer

        if tokenizer is None:
            require_tokenizer(found)
        return
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            kept = sorted(path.glob("snapshots/*/config.json"))
            instead = f"this snapshot of it: {kept[-1].parent}" if kept else "a transformers checkpoint"
            raise ModelError(f"{name}: no config.json in this folder; give {instead}")
        return
    if path.exists():
        raise ModelError(f"{name}: a file; give the checkpoint's folder, or a .gguf file")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings)
        raise ModelError(f"{name}: no such folder, and not a Hub name (owner/name){hint}")
