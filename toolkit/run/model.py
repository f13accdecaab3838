"""The model of a run: loaded in int8, compensated, adapted, and opened again with a finished adapter on it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from toolkit.adapters import TokenRows, adapter_coverage, add_rows, attach_lora, check_start, load_adapter
from toolkit.artifact import fetch_adapter, read_manifest, require_base
from toolkit.checkpoint.identity import identify_base
from toolkit.checkpoint.remote import fetch
from toolkit.data import Batches
from toolkit.errors import ModelError, RecipeError
from toolkit.offload.attach import load_streamed
from toolkit.offload.embedding import keep_on_host
from toolkit.offload.place import streamed
from toolkit.ops import BACKENDS
from toolkit.ops.few_queries import attend_to_few_together
from toolkit.ops.norms import fuse_norms, fused_norms
from toolkit.ops.sink_attention import attend_with_sinks
from toolkit.plan import Plan, device_memory, make_plan
from toolkit.plan.skeletons import shape_of
from toolkit.processes import first_one_first, join
from toolkit.quant import load_int8, measure
from toolkit.quant.gptq.calibrate import Compensation, calibration_examples, compensate_model
from toolkit.quant.gptq.keep import read_compensated, write_compensated
from toolkit.run.data import build_batches, dialogue, load_tokenizer, stop_as_trained
from toolkit.run.vocabulary import token_rows
from toolkit.run_folder import RunFolder
from toolkit.steps import part

__all__ = [
    "attach",
    "base_hash",
    "check_adapter",
    "compensate",
    "coverage",
    "get_ready",
    "left_out_by_start",
    "load",
    "load_frozen",
    "refuse_streamed_compensation",
    "reopen",
    "requantised",
]

_COMPENSATED = "onecard_compensated"
"""Attribute of a base model whose integers are those of error compensation."""


@part("load")
def load(plan: Plan) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen int8 model, quantised as its shards stream in, and its tokenizer.

    Expert stacks that the plan streams stay in the int8 file, which is written first where the checkpoint is not int8.

    Raises:
        ModelError: the plan leaves open which layers a budget lets be int8.
    """
    if plan.choice is not None:
        raise ModelError(
            "quantization.budget: which layers are int8 is not chosen yet; call choose_stacks(plan, batches), and "
            "make_plan(recipe, stacks=…) with the stacks it gives"
        )
    get_ready(plan)
    tokenizer = load_tokenizer(plan)
    with first_one_first() if streamed(plan.placement) else nullcontext():
        return load_frozen(plan), tokenizer


def get_ready(plan: Plan) -> None:
    """Take the device, and bring the checkpoint here, before the model is loaded."""
    if plan.backend not in BACKENDS:
        raise ModelError(f"{plan.backend}: no such expert backend; known: {', '.join(BACKENDS)}")
    join(plan.device)
    _forbid_spilling(plan)
    fetch(plan.model, plan.recipe.model.revision)


def load_frozen(plan: Plan) -> PreTrainedModel:
    """The model alone, with rows for tokens, in this process alone, once all is ready."""
    stored = plan.recipe.quantization
    options: dict[str, Any] = {
        "revision": plan.recipe.model.revision,
        "dtype": plan.torch_dtype,
        "device": plan.device,
        "experts": stored.experts,
        "linears": stored.linears,
        "attn_implementation": plan.recipe.model.attn_implementation,
        "experts_implementation": plan.backend,
        "stacks": plan.stacks,
    }
    if streamed(plan.placement):
        refuse_streamed_compensation(plan)
        model = load_streamed(plan.model, plan.placement, **options)[0]
    else:
        model = load_int8(plan.model, **options)[0]
    if plan.recipe.model.attn_implementation == "auto":
        attend_with_sinks(model)
        attend_to_few_together(model)
    add_rows(model, _token_rows(plan))
    if plan.device == "cuda":
        fuse_norms(model)
        if plan.recipe.placement.embedding == "host":
            keep_on_host(model, torch.device(plan.device))
    return model


def _token_rows(plan: Plan) -> TokenRows:
    asked = plan.recipe.model
    return token_rows(load_tokenizer(plan), asked.new_tokens, asked.trained_tokens) if asked.row_tokens else TokenRows()


def refuse_streamed_compensation(plan: Plan) -> None:
    """Raise `RecipeError` where streamed stacks are to be compensated: their file is finished when they are loaded."""
    if streamed(plan.placement) and plan.recipe.quantization.error_compensation != "none":
        raise RecipeError(
            "quantization.error_compensation: streamed experts are read from a file that is finished; run `onecard "
            "quantize` with compensation, and give its folder as model.model_name_or_path"
        )


def _forbid_spilling(plan: Plan) -> None:
    """Under WSL the driver puts into host memory what the card lacks, far slower; there torch has to refuse."""
    if plan.device == "cuda" and "microsoft" in platform.uname().release.lower():
        torch.cuda.set_per_process_memory_fraction(min(1.0, plan.memory / device_memory("cuda")))


@part("calibrate")
def compensate(model: PreTrainedModel, batches: Batches, plan: Plan, kept: Path | None = None) -> Compensation | None:
    """Round the int8 parts again with error feedback, on training examples, where the recipe asks for it.

    `kept` is a file of integers: read where it is there, so that a resumed run has the same base, written otherwise.
    """
    wanted = plan.recipe.quantization
    if wanted.error_compensation == "none":
        return None
    model.__dict__[_COMPENSATED] = True
    with first_one_first():
        if kept and kept.is_file():
            return read_compensated(model, kept, base_hash(plan))
        examples = calibration_examples(batches.train[: wanted.calibration_samples]["input_ids"])
        report = compensate_model(model, plan.model, examples, revision=plan.recipe.model.revision)
        if kept:
            write_compensated(model, report, kept, base_hash(plan))
        return report


def base_hash(plan: Plan) -> str:
    """Of the checkpoint's weights: compensated integers and measured layers belong to these alone."""
    return identify_base(plan.model, plan.recipe.model.revision).weights_sha256


def check_adapter(plan: Plan) -> None:
    """Raise `ModelError` unless the adapter that a run starts from, if it does, can be trained on; needs no weights."""
    if start := plan.recipe.lora.adapter_name_or_path:
        skeleton, tokens = shape_of(plan.model, plan.recipe.model.revision), _token_rows(plan)
        add_rows(skeleton, tokens)
        check_start(fetch_adapter(start), skeleton, tokens.ids, use_dora=plan.recipe.lora.use_dora)


@part("attach")
def attach(model: PreTrainedModel, plan: Plan) -> PeftModel:
    """LoRA on experts, router and linears, as the recipe says; fresh, or from an adapter on disk.

    Raises:
        ModelError: the recipe asks for a compensated base, and `compensate` has not been called.
    """
    lora, wanted = plan.recipe.lora, plan.recipe.quantization.error_compensation
    if wanted != "none" and _COMPENSATED not in model.__dict__:
        raise ModelError(
            f"quantization.error_compensation: {wanted}: call compensate(model, batches, plan) before this"
        )
    set_seed(plan.recipe.training.seed)
    if lora.adapter_name_or_path:
        check_adapter(plan)
        start = fetch_adapter(lora.adapter_name_or_path)
        require_base(start, plan.model, plan.recipe.model.revision)
        return load_adapter(model, start, is_trainable=True)
    ids = _token_rows(plan).ids
    return attach_lora(model, **lora.model_dump(exclude={"adapter_name_or_path"}), new_token_ids=ids)


def reopen(plan: Plan, artifact: str | Path, *, as_trained: bool = False) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The plan's model with a finished adapter on it, for evaluation and generation.

    A compensated run keeps its base's integers beside the artifact. An artifact without its run has none: `as_trained`
    then compensates again, which reads the training data; without it the base is rounded plainly. Which layers a budget
    has in int8 the artifact itself says.
    """
    if plan.choice is not None:
        plan = make_plan(plan.recipe, for_training=False, stacks=read_manifest(artifact).get("stacks"))
    model, tokenizer = load(plan)
    require_base(artifact, plan.model, plan.recipe.model.revision)
    kept = RunFolder(Path(artifact).parent).compensated
    if plan.recipe.quantization.error_compensation != "none":
        if kept.is_file():
            read_compensated(model, kept, base_hash(plan))
        elif as_trained:
            compensate(model, build_batches(tokenizer, plan), plan)
    stop_as_trained(model, dialogue(tokenizer, plan, Path(artifact)).form)
    return load_adapter(model, artifact), tokenizer


def requantised(model: PreTrainedModel) -> dict[str, Any] | None:
    """What rounding added to weights that others had quantised, as `Requantised.to_dict`; None for plain ones."""
    found = getattr(getattr(model.config, "quantization_config", None), "requantised", None)
    return None if found is None else dict(found)


def left_out_by_start(counts: Mapping[str, Any], plan: Plan) -> str | None:
    """What the recipe asks to adapt and the adapter that the run starts from does not hold; None where that is nothing.

    Args:
        counts: of `coverage`.
    """
    lora = plan.recipe.lora
    if lora.adapter_name_or_path is None:
        return None
    parts = (("experts", lora.experts, "expert stacks adapted"), ("router", lora.router, "routers adapted"))
    missing = [name for name, asked, count in parts if asked and not counts[count][0]]
    if not missing:
        return None
    fields = " and ".join(f"lora.{name}" for name in missing)
    return (
        f"lora.adapter_name_or_path: this adapter has no pairs on what {fields} would train, and the run adds none; "
        f"set {' '.join(f'lora.{name}=false' for name in missing)} to say so, or start without it"
    )


def coverage(model: PeftModel, plan: Plan) -> dict[str, Any]:
    """What is stored rounded, what is adapted and what has moved: each as [done, all], or a plain count."""
    stored, adapted = measure(model.get_base_model(), plan.architecture), adapter_coverage(model)
    kinds = sorted(stored.stacks_stored.items(), key=lambda kind: -kind[1])
    return {
        **{f"expert stacks {kind}": [count, stored.stacks] for kind, count in kinds},
        "linears 8-bit": [stored.linears_8bit, stored.linears],
        "expert stacks adapted": [adapted.stacks, adapted.stacks_all],
        "routers adapted": [adapted.routers, adapted.routers_all],
        "linears adapted": adapted.linears,
        "adapters moved": [adapted.moved, adapted.adapters],
        **({"token rows moved": [adapted.tokens_moved, adapted.tokens]} if adapted.tokens else {}),
        "trainable parameters": adapted.parameters,
        **({"norms fused": list(fused_norms(model))} if plan.device == "cuda" else {}),
    }
