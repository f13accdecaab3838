"""Bytes of a run by what they are: what stays, what a step adds, what the device's software takes beside both.

Weights, adapters and optimizer states follow from shapes; what a step holds is counted by rehearsing it
(`toolkit.plan.steps`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from toolkit.errors import ModelError
from toolkit.mtp.cost import HEAD_BYTES, head_bytes
from toolkit.parts import LINEAR_ROLES
from toolkit.plan.shapes import Shapes
from toolkit.plan.stacks import room_for_stacks, rounded_bytes
from toolkit.plan.steps import StepBytes
from toolkit.recipe import Recipe, keeps_start

__all__ = ["Bytes", "count_bytes", "has_own_table"]

_LIBRARIES = {"cuda": 600 << 20, "cpu": 650 << 20}
"""CUDA's context with its libraries, which torch's allocator does not count; on a CPU Python with torch and the rest,
in anonymous memory. The second is measured in each run and set apart from the run's own bytes."""
_WORKSPACE = {"cuda": (64 << 20) + (32 << 20), "cpu": (16 << 20) + (7 << 20)}
"""Experts multiplied out at a time (`toolkit.ops.triton.launch`), and cuBLAS's own. On a CPU what trainer and BLAS set
up when training begins, and what a second thread of the expert engine keeps, both measured (docs/planning.md); one
thread's buffers are rehearsed."""
_HEAD_WEIGHT = 4
"""Bytes of a head's parameter before it learns; gradient and moments come with its first step."""
_A_THREAD = 13 << 20
"""What a thread keeps on a CPU, where micro-batches that go together have one each: MKL's own allocator about 10 MiB
(measured: with MKL_DISABLE_FAST_MM=1 they are gone), the expert engine a buffer of 2 MiB."""
_SLACK = {"cuda": 0.05, "cpu": 0.5}
"""Share of what comes and goes that the allocator's rounding and holes add. Half is what glibc kept in holes with its
own settings (docs/planning.md); on a card it is assumed."""
_OPTIMIZER = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_bnb_8bit": 2.03,
    "paged_adamw_8bit": 2.03,
    "schedule_free_adamw": 8.0,
}
"""Bytes of state a trained parameter; 8-bit ones have a fp32 maximum for each 256 values. The schedule-free one has the
point that it steps from in place of the first moment."""


@dataclass(frozen=True)
class Bytes:
    """Bytes of a training run at its highest, by what they are; their sum is what the device must have."""

    experts: int
    slots: int
    linears: int
    other: int
    adapter: int
    optimizer: int
    gradients: int
    mtp: int = 0
    activations: int = 0
    evaluation: int = 0
    """What held-out examples need beyond all that a step holds."""
    workspace: int = 0
    slack: int = 0
    libraries: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(asdict(self).values())

    @property
    def standing(self) -> int:
        """What is there between two steps."""
        return self.experts + self.slots + self.linears + self.other + self.adapter + self.optimizer + self.mtp

    @property
    def run(self) -> int:
        """What the run itself asks for: all but the libraries and the allocator's holes."""
        return self.total - self.libraries - self.slack


def count_bytes(
    shapes: Shapes,
    recipe: Recipe,
    placement: Mapping[str, str],
    *,
    device: str,
    itemsize: int,
    step: StepBytes,
    evaluating: int = 0,
    micro_batches_per_pass: int = 1,
    learning: int = 0,
) -> Bytes:
    """All groups.

    Args:
        learning: what a head holds while it learns: beside what the micro-batch has saved, or once the steps are over.
        step: what a micro-batch holds.
        micro_batches_per_pass: how many of them go through a streamed layer before the next.
        evaluating: most bytes of a pass over held-out examples.
    """
    architecture, parameters = shapes.architecture, shapes.parameters
    experts, slots = room_for_stacks(shapes, recipe.quantization.experts, itemsize, placement)
    stacks = sum(math.prod(parameters[name]) for layer in architecture.layers for name in layer.stacks)
    names = architecture.linear_names(*LINEAR_ROLES)
    linears = [(math.prod(parameters[f"{name}.weight"]), parameters[f"{name}.weight"][0]) for name in names]
    rest = sum(map(math.prod, parameters.values())) - stacks - sum(size for size, _ in linears)
    adapter = adapter_parameters(shapes, recipe)
    rows, on_host = token_parameters(shapes, recipe), host_rows(shapes, recipe, device)
    gradients = 4 * adapter
    micro, per_pass = recipe.training.gradient_accumulation_steps, micro_batches_per_pass
    held = _held(step, gradients, micro, per_pass, len(architecture.layers))
    held = max(held, learning + per_pass * step.saved if learning and recipe.mtp.reads_data else 0)
    held = max(held, gradients + _optimizer_scratch(recipe, device, adapter))
    head = _head(shapes, recipe)
    if head and not recipe.mtp.reads_data:  # it learns when the steps are over: one is the peak, or the other
        idle = head * _HEAD_WEIGHT // HEAD_BYTES
        head, held = max((idle, held), (head, learning), key=sum)
    activations = max(0, held - gradients)
    optimizer = int(_OPTIMIZER[recipe.training.optim] * adapter)
    # The table is loaded with the rest; adapter, optimizer and steps come when it is gone.
    activations = max(activations, on_host * itemsize - 4 * adapter - optimizer - gradients)
    evaluation = max(0, evaluating - gradients - activations)
    return Bytes(
        experts=experts,
        slots=slots,
        linears=rounded_bytes(linears, recipe.quantization.linears, itemsize),
        other=(rest + 2 * rows - on_host) * itemsize,  # new rows of the embedding and head, and PEFT's copy of them
        adapter=4 * adapter * (2 if keeps_start(recipe) else 1),
        optimizer=optimizer,
        gradients=gradients,
        mtp=head,
        activations=activations,
        evaluation=evaluation,
        workspace=_WORKSPACE[device] + (per_pass * _A_THREAD if device == "cpu" and per_pass > 1 else 0),
        slack=int(_SLACK[device] * (gradients + activations + evaluation)),
        libraries=_LIBRARIES[device],
    )


def _held(step: StepBytes, gradients: int, micro: int, per_pass: int, layers: int) -> int:
    """Most bytes of gradients and activations: later micro-batches have the gradients of earlier ones beside them.

    Where all go together, only the last layer's are there when the others compute their loss.
    """
    before = 0 if micro == 1 else gradients // layers if per_pass == micro else gradients
    return max(step.peak, before + (step.bare or step.peak)) + (per_pass - 1) * step.saved


def _head(shapes: Shapes, recipe: Recipe) -> int:
    if not recipe.mtp.enabled:
        return 0
    if "head_parameters" not in shapes.numbers:
        raise ModelError("mtp.enabled: this family keeps its decoder layers where no head can copy one; remove it")
    return head_bytes(recipe.mtp.num_mtp_layers * shapes.numbers["head_parameters"])


_LISTS = ("adamw_torch", "schedule_free_adamw")
"""Optimizers whose step on a card goes over lists of all tensors at once."""


def _optimizer_scratch(recipe: Recipe, device: str, adapter: int) -> int:
    """What AdamW's step makes: with torch's own one on a card a list of square roots, as large as the adapter."""
    return 4 * adapter if device == "cuda" and recipe.training.optim in _LISTS else 0


def adapter_parameters(model: Shapes, recipe: Recipe) -> int:
    """Trained parameters of the recipe's adapter."""
    shapes, architecture = model.parameters, model.architecture
    lora, total = recipe.lora, 0
    rank_of_all = rank(recipe)
    for layer in (layer for layer in architecture.layers if layer.sees_text):
        of_experts = lora.rank_pattern.get("experts", rank_of_all)
        total += sum(layer.num_experts * of_experts * sum(shapes[name][1:]) for name in layer.stacks if lora.experts)
        if lora.router:
            total += lora.rank_pattern.get("router", rank_of_all) * sum(shapes[f"{layer.router}.weight"])
    roles = {"attention": ("attention",), "all-linear": LINEAR_ROLES, "none": ()}
    wanted = lora.target_modules
    for linear in architecture.linears:
        leaf = linear.name.rpartition(".")[2]
        if linear.role in roles[wanted] if isinstance(wanted, str) else {leaf, linear.name} & set(wanted):
            shape = shapes[f"{linear.name}.weight"]
            total += lora.rank_pattern.get(leaf, rank_of_all) * sum(shape) + (shape[0] if lora.use_dora else 0)
    return total + token_parameters(model, recipe)


def token_parameters(model: Shapes, recipe: Recipe) -> int:
    """Trained numbers in rows of tokens: of the embedding, and of a head that is not tied to it."""
    return len(recipe.model.row_tokens) * max(1, len(_ends(model))) * (model.numbers.get("hidden_size") or 0)


def host_rows(model: Shapes, recipe: Recipe, device: str) -> int:
    """Numbers of an embedding table that stays in host memory beside a card."""
    is_beside = device == "cuda" and recipe.placement.embedding == "host"
    return math.prod(_ends(model)[0]) if is_beside and has_own_table(model) else 0


def has_own_table(model: Shapes) -> bool:
    """Whether embedding and head are two tables of the same shape."""
    return len(_ends(model)) == 2


def _ends(model: Shapes) -> list[tuple[int, ...]]:
    """Shapes of the embedding, and of a head that is not tied to it."""
    row = model.numbers.get("vocab_size"), model.numbers.get("hidden_size")
    return [tuple(shape) for shape in model.parameters.values() if tuple(shape) == row]


def rank(recipe: Recipe) -> int:
    """The recipe's rank, decided."""
    return int(recipe.lora.r)
