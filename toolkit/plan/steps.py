"""What a step holds: asked of a record that comes with the package, of the user's cache, and else of a rehearsal.

A rehearsal runs the step on tensors without memory (`toolkit.rehearsal`) and takes seconds; its answer depends on
nothing but the spec, the installed versions and our own sources.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.files import cache_root
from toolkit.durable import write_text
from toolkit.plan.shapes import rehearsal_versions
from toolkit.recipe import Recipe, rollout_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "StepBytes",
    "StepShape",
    "StepSpec",
    "cache_bytes",
    "cached_bytes",
    "rehearsed",
    "step_spec",
    "trained_rows",
]

_REHEARSED = ("rehearsal", "ops", "adapters", "quant", "architecture.py", "parts.py", "labels.py")
"""Our sources that a rehearsal runs."""
_LATER = {"new_tokens": 0, "whole_logits": False, "share": 1}
_SCALES = ("lora_alpha", "alpha_pattern", "use_rslora")
"""Of the adapter: no byte depends on them."""


@dataclass(frozen=True)
class StepShape:
    """What of a step the data decide: tokens in the longest sequence, and how many of them carry a label.

    Where they were looked at, also what evaluation meets: tokens in the longest held-out sequence, its labels, and
    tokens in the longest prompt that is answered; and of pairs, tokens and labels of both answers behind one prompt.
    """

    length: int
    labelled: int
    held_out: int = 0
    held_out_labelled: int = 0
    prompt: int = 0
    pair: int = 0
    pair_labelled: int = 0

    def within(self, length: int) -> StepShape:
        """No more than sequences of this length have."""
        sizes = {name: min(size, 2 * length if "pair" in name else length) for name, size in vars(self).items()}
        return StepShape(**sizes)


@dataclass(frozen=True)
class StepBytes:
    """Bytes beyond what stands: the most at once, gradients among them; those of a micro-batch that waits; and the most
    at once beside gradients of micro-batches before."""

    peak: int
    saved: int = 0
    bare: int = 0


@dataclass(frozen=True)
class StepSpec:
    """All that decides a step's bytes but the model. `kind`: train, loss (held out) or generate (prompt and answer)."""

    kind: str
    batch: int
    length: int
    labelled: int
    dtype: str
    checkpointing: bool
    balanced: bool
    on_card: bool
    backend: str
    experts: str
    linears: str
    packed: bool
    attn: str
    lora: str
    """The recipe's section, JSON."""
    new_tokens: int = 0
    """Tokens whose rows are trained."""
    whole_logits: bool = False
    """Whether the loss takes each label's whole row of logits."""
    share: int = 1
    """Answers behind one prompt in each sequence."""

    def digest(self, *more: str) -> str:
        """16 hex digits of the spec, and of what else it depends on."""
        lora = {key: value for key, value in json.loads(self.lora).items() if key not in _SCALES}
        told = {**asdict(self), "lora": lora}
        if not lora.get("use_dora"):
            lora.pop("use_dora", None)
        for name, usual in _LATER.items():  # what was decided before these were there is still right without them
            if told[name] == usual:
                del told[name]
        return sha256(json.dumps([told, *more], sort_keys=True).encode()).hexdigest()[:16]


def trained_rows(recipe: Recipe, shape: StepShape, shared_length: int) -> tuple[int, int, int, int]:
    """Sequences of a forward pass in training, their tokens, labels among them, and answers behind one prompt in each.

    `shared_length`: tokens up to which the model may have several answers behind a prompt.
    """
    sides, length, labelled = recipe.training.sides, shape.length, shape.labelled
    batch, options = recipe.training.per_device_train_batch_size, rollout_options(recipe)
    if length > shared_length:
        return batch * sides, length, labelled, 1
    if sides == 2 and shape.pair:
        return batch, shape.pair, shape.pair_labelled, 2
    if options and (share := options.sharing(recipe.training)) > 1:
        answer = min(labelled, options.max_completion_length)
        return batch // share, length - answer - 1 + share * (answer + 1), share * answer, share
    return batch * sides, length, labelled, 1


def step_spec(
    recipe: Recipe,
    shape: StepShape,
    *,
    device: str,
    dtype: str,
    backend: str,
    kind: str = "train",
    shared_length: int = 0,
) -> StepSpec:
    """What a recipe with rank and length decided asks.

    Args:
        device: cuda or cpu. kind: as in a spec, or rollouts, which is to generate in training.
        shared_length: tokens up to which answers to a prompt share it.
    """
    training, lora = recipe.training, recipe.lora
    batch, length, labelled, share = trained_rows(recipe, shape, shared_length)
    if kind == "loss":
        batch = training.per_device_eval_batch_size * training.sides
        batch = max(batch, recipe.eval.batch_size if recipe.eval.enabled else 1)
        length, labelled = shape.held_out, max(1, shape.held_out_labelled)
    if kind == "generate":
        batch, length, labelled = recipe.eval.batch_size, shape.prompt + recipe.eval.max_new_tokens, 1
    if kind == "rollouts":
        options = rollout_options(recipe)
        assert options is not None
        batch, length, labelled = options.at_once(training), shape.length, 1
    trains = kind == "train"
    return StepSpec(
        kind="generate" if kind == "rollouts" else kind,
        batch=batch,
        length=length,
        labelled=labelled,
        dtype=dtype,
        checkpointing=trains and training.gradient_checkpointing,
        balanced=trains and lora.router and training.router_aux_loss_coef != 0,
        on_card=device == "cuda",
        backend=backend,
        experts=recipe.quantization.experts,
        linears=recipe.quantization.linears,
        packed=trains and training.packing,
        attn=recipe.model.attn_implementation,
        lora=lora.model_dump_json(exclude={"adapter_name_or_path"}),
        new_tokens=len(recipe.model.row_tokens),
        whole_logits=trains and training.label_smoothing_factor > 0,
        share=share if trains else 1,
    )


def rehearsed(model: PreTrainedModel, spec: StepSpec) -> StepBytes:
    """The answer of a rehearsal; the skeleton `model` is used up."""
    import torch

    from toolkit import rehearsal

    given = {**asdict(spec), "dtype": getattr(torch, spec.dtype), "lora": json.loads(spec.lora)}
    del given["attn"]
    if find_spec("triton") is None:  # a card elsewhere has it; here its kernels cannot even be rehearsed
        given["backend"] = "onecard_per_expert"
    return StepBytes(*rehearsal.rehearse(model, rehearsal.Step(**given)))


def cached_bytes(spec: StepSpec, model: str, record: Mapping[str, Any]) -> StepBytes | None:
    """An answer given before: in a published model's record, or in the user's cache. `model`: its config's JSON."""
    found = record.get("steps", {}).get(spec.digest())
    if found is None:
        with suppress(OSError, ValueError):
            found = json.loads(_file(spec, model).read_text(encoding="utf-8"))
    try:
        return StepBytes(*map(int, found))
    except TypeError:  # none, or a damaged file
        return None


def cache_bytes(spec: StepSpec, model: str, held: StepBytes) -> None:
    """Keep an answer in the user's cache, where that can be written."""
    path = _file(spec, model)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(astuple(held)))


def _file(spec: StepSpec, model: str) -> Path:
    key = spec.digest(model, json.dumps(rehearsal_versions(), sort_keys=True), _sources())
    return cache_root() / "steps" / f"{key}.json"


@cache
def _sources() -> str:
    house, digest = Path(__file__).parents[1], sha256()
    for room in _REHEARSED:
        path = house / room
        for file in sorted(path.rglob("*.py")) if path.is_dir() else (path,):
            digest.update(file.read_bytes())
    return digest.hexdigest()
