"""From a plan to an adapted model and its batches; each step hands the plan's fields to a room."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from toolkit.adapters import adapter_coverage, attach_lora, load_adapter
from toolkit.data import Batches, read_chat_template
from toolkit.data import build_batches as build_from_rows
from toolkit.data.token_table import count_trained, sequence_lengths
from toolkit.errors import ModelError, RecipeError, first_line
from toolkit.evaluate import LOSS, find_metric
from toolkit.flow.asking import declared_stops, dialogue, recorded_form, stop_as_trained
from toolkit.flow.head import own_prompts
from toolkit.flow.judge import general_text, held_out
from toolkit.offload import load_streamed
from toolkit.ops import BACKENDS
from toolkit.packaging import fetch_adapter, identify_base, require_base
from toolkit.plan import Plan, StepShape
from toolkit.plan.place import streamed
from toolkit.quant import fetch, load_int8, measure
from toolkit.quant.calibrate import Compensation, calibration_examples, compensate_model
from toolkit.quant.keep import read_compensated, write_compensated
from toolkit.ranks import first_one_first, join
from toolkit.steps import part
from toolkit.training import RunFolder

__all__ = ["attach", "build_batches", "compensate", "coverage", "load", "load_tokenizer", "reopen", "step_shape"]


def load_tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with the recipe's chat template where it names one."""
    recipe = plan.recipe
    try:
        tokenizer = AutoTokenizer.from_pretrained(plan.model, revision=recipe.model.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{plan.model}: no usable tokenizer: {first_line(error)}") from None
    if recipe.data.chat_template_path:
        tokenizer.chat_template = read_chat_template(Path(recipe.data.chat_template_path))
    result: PreTrainedTokenizerBase = tokenizer
    return result


@part("load")
def load(plan: Plan) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen int8 model, quantised as its shards stream in, and its tokenizer.

    Expert stacks that the plan streams stay in the int8 file, which is written first where the checkpoint is not int8.
    """
    if plan.backend not in BACKENDS:
        raise ModelError(f"{plan.backend}: no such expert backend; there are {', '.join(BACKENDS)}")
    join(plan.device)
    if not Path(plan.model).is_dir():
        fetch(plan.model, plan.recipe.model.revision)
    tokenizer, stored = load_tokenizer(plan), plan.recipe.quantization
    options: dict[str, Any] = {
        "revision": plan.recipe.model.revision,
        "dtype": plan.torch_dtype,
        "device": plan.device,
        "experts": stored.experts,
        "linears": stored.linears,
        "attn_implementation": plan.recipe.model.attn_implementation,
        "experts_implementation": plan.backend,
    }
    if not streamed(plan.placement):
        return load_int8(plan.model, **options)[0], tokenizer
    if stored.error_compensation != "none":
        raise RecipeError(
            "quantization.error_compensation: streamed experts are read from a file that is finished; run `onecard "
            "quantize` with compensation, and give its folder as model.model_name_or_path"
        )
    with first_one_first():
        return load_streamed(plan.model, plan.placement, **options)[0], tokenizer


@part("calibrate")
def compensate(model: PreTrainedModel, batches: Batches, plan: Plan, kept: Path | None = None) -> Compensation | None:
    """Round the int8 parts again with error feedback, on training examples, where the recipe asks for it.

    `kept` is a file of integers: read where it is there, so that a resumed run has the same base, written otherwise.
    """
    wanted = plan.recipe.quantization
    if wanted.error_compensation == "none":
        return None
    with first_one_first():
        if kept and kept.is_file():
            return read_compensated(model, kept, _base_hash(plan))
        examples = calibration_examples(batches.train[: wanted.calibration_samples]["input_ids"])
        report = compensate_model(model, plan.model, examples, revision=plan.recipe.model.revision)
        if kept:
            write_compensated(model, report, kept, _base_hash(plan))
        return report


def _base_hash(plan: Plan) -> str:
    """Of the checkpoint's weights: compensated integers belong to these alone."""
    return identify_base(plan.model, plan.recipe.model.revision).weights_sha256


@part("attach")
def attach(model: PreTrainedModel, plan: Plan) -> PeftModel:
    """LoRA on experts, router and linears, as the recipe says; fresh, or from an adapter on disk."""
    lora = plan.recipe.lora
    set_seed(plan.recipe.training.seed)
    if lora.adapter_name_or_path:
        start = fetch_adapter(lora.adapter_name_or_path)
        require_base(start, plan.model, plan.recipe.model.revision)
        return load_adapter(model, start, is_trainable=True)
    return attach_lora(model, **lora.model_dump(exclude={"adapter_name_or_path"}))


def reopen(plan: Plan, artifact: str | Path, *, as_trained: bool = False) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The plan's model with a finished adapter on it, for evaluation and generation.

    A compensated run keeps its base's integers beside the artifact. An artifact without its run has none: `as_trained`
    then compensates again, which reads the training data; without it the base is rounded plainly.
    """
    model, tokenizer = load(plan)
    require_base(artifact, plan.model, plan.recipe.model.revision)
    kept = RunFolder(Path(artifact).parent).compensated
    if plan.recipe.quantization.error_compensation != "none":
        if kept.is_file():
            read_compensated(model, kept, _base_hash(plan))
        elif as_trained:
            compensate(model, build_batches(tokenizer, plan), plan)
    stop_as_trained(model, dialogue(tokenizer, plan, Path(artifact)).form)
    return load_adapter(model, artifact), tokenizer


def coverage(model: PeftModel, plan: Plan) -> dict[str, Any]:
    """What is int8, what is adapted and what has moved: each as [done, all], or a plain count."""
    stored, adapted = measure(model.get_base_model(), plan.architecture), adapter_coverage(model)
    return {
        "expert stacks int8": [stored.stacks_int8, stored.stacks],
        "linears 8-bit": [stored.linears_8bit, stored.linears],
        "expert stacks adapted": [adapted.stacks, adapted.stacks_all],
        "routers adapted": [adapted.routers, adapted.routers_all],
        "linears adapted": adapted.linears,
        "adapters moved": [adapted.moved, adapted.adapters],
        "trainable parameters": adapted.parameters,
    }


@part("tokenise")
def build_batches(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Batches:
    """The recipe's examples, validated and masked; TRL packs them. What evaluation needs is tried, too.

    Raises:
        DataError: the examples or the general text cannot be used. RecipeError: there is no such metric.
    """
    general_text(tokenizer, plan)
    if plan.recipe.eval.metric != LOSS:
        find_metric(plan.recipe.eval.metric)
    data = plan.recipe.data.model_dump(exclude={"chat_template_path"})
    training = plan.recipe.training
    assert isinstance(training.max_length, int)
    recorded = recorded_form(plan.folder)
    return build_from_rows(
        tokenizer,
        **data,
        max_length=training.max_length,
        seed=training.seed,
        stop_token_ids=declared_stops(plan),
        date=datetime.date.fromisoformat(recorded.date) if recorded and recorded.date else None,
    )


def step_shape(batches: Batches, plan: Plan) -> StepShape:
    """The longest training sequence and its labels, packed or not; of packed ones a bound, since TRL packs later.

    Of what is held out, the longest sequence that is looked at, the most labels of one, and the longest prompt, or that
    of the prompts which the model answers for its head.
    """
    training = plan.recipe.training
    assert isinstance(training.max_length, int)
    lengths, labels = sequence_lengths(batches.train), count_trained(batches.train)
    looked_at = held_out(batches, plan)
    others = [] if looked_at is None else [int(f(looked_at).max()) for f in (sequence_lengths, count_trained)]
    questions = batches.held_out[: plan.recipe.eval.max_samples] if plan.recipe.eval.enabled and others else ()
    prompts = [len(question.prompt_ids) for question in questions] + list(map(len, own_prompts(batches, plan)))
    beside = (*(others or (0, 0)), max(prompts, default=0))
    longest = int(lengths.max())
    if not training.packing:
        one = training.per_device_train_batch_size == 1
        return StepShape(longest, int(labels.max()) if one else longest, *beside)
    length = min(training.max_length, int(lengths.sum()))
    return StepShape(length, _most_labels(lengths, labels, length), *beside)


def _most_labels(lengths: NDArray[np.int64], labels: NDArray[np.int64], room: int) -> int:
    """A bound on the labels in one packed sequence of `room` tokens: of the rows that are labelled most densely."""
    share = labels / lengths
    order = np.lexsort((lengths, share))[::-1]
    taken = np.diff(np.minimum(np.cumsum(lengths[order]), room), prepend=0)
    return max(1, math.ceil(float((share[order] * taken).sum())))
