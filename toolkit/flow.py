"""The one flow: plan -> load -> attach -> build_batches -> train -> package, each step a function of the plan.

These are the public verbs. They only hand the plan's fields to the rooms, which take plain arguments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from toolkit.adapters import adapter_coverage, attach_lora, load_adapter, unmoved_adapters
from toolkit.data import Batches, read_chat_template
from toolkit.data import build_batches as build_from_rows
from toolkit.durable import write_text
from toolkit.errors import ModelError, RecipeError, first_line
from toolkit.evaluate import (
    LOSS,
    Comparison,
    compare,
    expert_statistics,
    find_metric,
    held_out_loss,
    read_windows,
    score_now,
)
from toolkit.offload import load_streamed
from toolkit.ops import BACKENDS
from toolkit.packaging import fetch_adapter, identify_base, write_artifact
from toolkit.packaging.manifest import file_entry
from toolkit.plan import BACKENDS as PLANNED
from toolkit.plan import ROUNDED_ROWS, Plan, StepShape, nearest_change
from toolkit.plan.place import streamed
from toolkit.quant import load_int8, measure
from toolkit.quant.calibrate import Compensation, compensate_model
from toolkit.quant.keep import read_compensated, write_compensated
from toolkit.ranks import first_one_first, is_first, join
from toolkit.recipe import dump, flat
from toolkit.signals import StopRequest
from toolkit.steps import part
from toolkit.training import (
    BestAdapter,
    Resume,
    RunFolder,
    TrainResult,
    data_sha256,
    find_resume,
    require_disk,
    tokenizer_sha256,
    train_adapter,
    versions,
)

__all__ = [
    "Trained",
    "attach",
    "build_batches",
    "compensate",
    "coverage",
    "evaluate",
    "load",
    "load_tokenizer",
    "look_at_experts",
    "package",
    "reopen",
    "resume",
    "step_shape",
    "train",
]

_NOT_TRL = {"output_dir", "load_best_model_at_end", "early_stopping_patience"}
_MARGIN = 64 << 20
"""Bytes for everything small that a run writes."""
_LONGEST_WINDOW = 512
"""Tokens of general text that are looked at together."""
_LOOKED_AT = 64
"""Examples on which the experts are watched, and training examples that stand in where none are held out."""


@dataclass(frozen=True)
class Trained:
    """A trained adapter still on its model, with all that was counted and measured."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    training: TrainResult
    counts: dict[str, Any]
    comparison: Comparison | None
    rows: tuple[str, ...] = ()
    """What the answers of the training data say: none of it may leave with the artifact."""

    def results(self) -> dict[str, Any]:
        """Figures that the same recipe gives again: training loss and steps, base against adapted."""
        run = self.training
        figures = {"training": {"loss": run.loss, "steps": run.steps, "tokens": run.tokens}}
        return {**figures, **(self.comparison.to_dict() if self.comparison else {})}


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
        examples = batches.train[: wanted.calibration_samples]["input_ids"]
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
        return load_adapter(model, fetch_adapter(lora.adapter_name_or_path), is_trainable=True)
    return attach_lora(model, **lora.model_dump(exclude={"adapter_name_or_path"}))


def reopen(plan: Plan, artifact: str | Path, *, as_trained: bool = False) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The plan's model with a finished adapter on it, for evaluation and generation.

    A compensated run keeps its base's integers beside the artifact. An artifact without its run has none: `as_trained`
    then compensates again, which reads the training data; without it the base is rounded plainly.
    """
    model, tokenizer = load(plan)
    kept = RunFolder(Path(artifact).parent).compensated
    if plan.recipe.quantization.error_compensation != "none":
        if kept.is_file():
            read_compensated(model, kept, _base_hash(plan))
        elif as_trained:
            compensate(model, build_batches(tokenizer, plan), plan)
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
    _general(tokenizer, plan)
    if plan.recipe.eval.metric != LOSS:
        find_metric(plan.recipe.eval.metric)
    data = plan.recipe.data.model_dump(exclude={"chat_template_path"})
    training = plan.recipe.training
    assert isinstance(training.max_length, int)
    return build_from_rows(tokenizer, **data, max_length=training.max_length, seed=training.seed)


def step_shape(batches: Batches, plan: Plan) -> StepShape:
    """The longest training sequence and its labels, packed or not; of packed ones a bound, since TRL packs later."""
    training = plan.recipe.training
    assert isinstance(training.max_length, int)
    labels = [len(row) - row.count(-100) for row in batches.train["labels"]]
    lengths = [len(row) for row in batches.train["input_ids"]]
    if not training.packing:
        one = training.per_device_train_batch_size == 1
        return StepShape(max(lengths), max(labels) if one else max(lengths))
    length = min(training.max_length, sum(lengths))
    shares = sorted((label / size, size) for label, size in zip(labels, lengths, strict=True))
    room, labelled = length, 0.0
    while shares and room > 0:
        share, size = shares.pop()
        labelled += share * min(size, room)
        room -= size
    return StepShape(length, max(1, math.ceil(labelled)))


def resume(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, batches: Batches, note: Callable[[str], None] = lambda line: None
) -> Resume:
    """The checkpoint that this run goes on from, if it may, and room for the next ones; cheap, so ask before loading.

    What is skipped or changed and allowed is noted. The base's weights are compared in `train`, once they are here.

    Raises:
        ModelError: the run in the plan's folder was trained with something else. ResourceError: the disk is too small.
    """
    run = RunFolder(plan.folder)
    adapter, kept = plan.bytes.adapter, max(2, plan.recipe.training.save_total_limit)
    integers = plan.bytes.experts + plan.bytes.linears
    compensated = integers if plan.recipe.quantization.error_compensation != "none" else 0
    # What is kept, the best one, the one being written; and the artifact, written beside an older one.
    require_disk(run.path, (kept + 2) * (adapter + plan.bytes.optimizer) + 2 * adapter + compensated + _MARGIN)
    found = find_resume(run.checkpoints, note)
    found.bind(
        note,
        recipe=flat(plan.recipe),
        data=data_sha256(batches.train),
        tokenizer=tokenizer_sha256(tokenizer),
        versions=versions(),
        device=plan.device,
        dtype=plan.dtype,
        backend=plan.backend,
    )
    return found


@part("train")
def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    plan: Plan,
    console: Console | None = None,
    resumed: Resume | None = None,
    stop: StopRequest | None = None,
) -> Trained:
    """Train the adapter and compare it with its base on the held-out examples (in the first process).

    Goes on from a checkpoint in the plan's folder: `resumed`, or what `resume` finds.

    Raises:
        ModelError: an adapter did not move, or the checkpoint was trained on another base.
        DivergedError: the loss stopped being finite. ResourceError: memory or disk ran out.
        RecipeError: int8 rows were asked for and raise the loss too far.
    """
    console = console or Console(quiet=True)
    note = partial(console.print, highlight=False, markup=False)
    resumed = resumed or resume(plan, tokenizer, batches, note)
    resumed.bind(note, **_base_facts(plan))
    if plan.backend == ROUNDED_ROWS:
        looked_at = _held_out(batches, plan) or batches.train.select(range(min(len(batches.train), _LOOKED_AT)))
        require_harmless_rounding(model, looked_at, plan.recipe.eval.batch_size)
    recipe, run = plan.recipe, RunFolder(plan.folder)
    tracking = {"report_to": list(recipe.tracking.report_to), "run_name": recipe.tracking.run_name or plan.folder.name}
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    training = train_adapter(
        model,
        tokenizer,
        batches.train,
        _held_out(batches, plan),
        folder=run.checkpoints,
        metrics=run.metrics,
        arguments={**recipe.training.model_dump(exclude=_NOT_TRL), **tracking},
        device=plan.device,
        dtype=plan.dtype,
        train_router=recipe.lora.router,
        console=console,
        best=_wanted_best(model, tokenizer, batches, plan),
        advice=plan.changes[0].what if plan.changes else nearest_change(recipe),
        resume=resumed,
        stop=stop,
        places=batches.places,
    )
    counts = coverage(model, plan)
    moved, adapters = counts["adapters moved"]
    if moved != adapters and training.best_step is not None:
        raise ModelError(
            f"the best evaluation is that of step {training.best_step}, where {moved} of {adapters} adapters had "
            "moved: training made it worse; lower training.learning_rate or look at eval.metric"
        )
    if moved != adapters:
        still = unmoved_adapters(model)
        raise ModelError(
            f"only {moved} of {adapters} adapters moved in {training.steps} steps, not {', '.join(still[:3])}"
            f"{', …' if len(still) > 3 else ''}; raise training.learning_rate, or train longer"
        )
    compared = evaluate(model, tokenizer, batches, plan) if is_first() else None
    if is_first():
        look_at_experts(model, batches, plan)
    return Trained(model, tokenizer, training, counts, compared, _answers(tokenizer, batches.train))


def _wanted_best(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, batches: Batches, plan: Plan
) -> BestAdapter | None:
    """What the run keeps the best adapter or stops by; None where it does neither.

    Raises:
        RecipeError: there are no held-out examples to judge by.
    """
    training, wanted = plan.recipe.training, plan.recipe.eval
    if not training.load_best_model_at_end and training.early_stopping_patience is None:
        return None
    questions = batches.held_out[: wanted.max_samples]
    if batches.validation is None or (wanted.metric != LOSS and not questions):
        raise RecipeError(
            "training.load_best_model_at_end: nothing is held out to judge by; add data.validation_size=0.1"
        )
    score = partial(
        score_now,
        model,
        tokenizer,
        questions,
        metric=wanted.metric,
        max_new_tokens=wanted.max_new_tokens,
        batch_size=wanted.batch_size,
    )
    return BestAdapter(
        plan.folder,
        LOSS if wanted.metric == LOSS else find_metric(wanted.metric)[0],
        lower=wanted.metric == LOSS,
        score=None if wanted.metric == LOSS else score,
        patience=training.early_stopping_patience,
        restore=training.load_best_model_at_end,
    )


@part("look at experts")
def look_at_experts(model: PeftModel, batches: Batches, plan: Plan) -> dict[str, Any]:
    """Who was routed to with the adapter off and on, and how far each expert's adapter moved; kept in the run folder.

    Looked at are held-out examples, or training examples where none are held out.
    """
    held_out = _held_out(batches, plan)
    examples = (batches.train if held_out is None else held_out)[:_LOOKED_AT]["input_ids"]
    found = {"held_out": held_out is not None, **expert_statistics(model, examples)}
    write_text(RunFolder(plan.folder).experts, json.dumps(found))
    return found


def _base_facts(plan: Plan) -> dict[str, Any]:
    kept = RunFolder(plan.folder).compensated
    facts = {"base": identify_base(plan.model, plan.recipe.model.revision).weights_sha256}
    return {**facts, "compensated": file_entry(kept)["sha256"] if kept.is_file() else None}


def _answers(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> tuple[str, ...]:
    """The trained text of each row."""
    trained = [[i for i, label in zip(r["input_ids"], r["labels"], strict=True) if label != -100] for r in rows]
    return tuple(tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in trained)


def require_harmless_rounding(
    model: PeftModel, sequences: Dataset, batch_size: int, plain: str = PLANNED["cuda"], rounded: str = ROUNDED_ROWS
) -> None:
    """Raise `RecipeError` where int8 rows raise the loss on these examples too far; the model then computes with them.

    Args:
        sequences: rows of `input_ids` and `labels`. plain, rounded: the backends compared, by name.
    """
    from toolkit.ops.triton.w8a8 import compare_losses

    base = model.get_base_model()

    def loss_of(backend: str) -> float:
        base.set_experts_implementation(backend)
        return held_out_loss(model, sequences, batch_size)

    model.eval()
    compare_losses(loss_of, plain=plain, rounded=rounded).require()


@part("evaluate")
def evaluate(model: PeftModel, tokenizer: PreTrainedTokenizerBase, batches: Batches, plan: Plan) -> Comparison | None:
    """Base against adapted on the held-out examples, or None where there are none or the recipe says no."""
    wanted, sequences = plan.recipe.eval, _held_out(batches, plan)
    if not wanted.enabled or sequences is None:
        return None
    return compare(
        model,
        tokenizer,
        sequences,
        batches.held_out[: wanted.max_samples],
        metric=wanted.metric,
        general=_general(tokenizer, plan),
        max_new_tokens=wanted.max_new_tokens,
        batch_size=wanted.batch_size,
    )


def _general(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Dataset | None:
    """The recipe's general text in windows."""
    path, longest = plan.recipe.eval.regression, plan.recipe.training.max_length
    length = _LONGEST_WINDOW if longest == "auto" else min(longest, _LONGEST_WINDOW)
    return read_windows(tokenizer, Path(path), length) if path else None


def _held_out(batches: Batches, plan: Plan) -> Dataset | None:
    """The held-out sequences that the recipe wants looked at."""
    if batches.validation is None:
        return None
    return batches.validation.select(range(min(len(batches.validation), plan.recipe.eval.max_samples or 1 << 40)))


@part("package")
def package(result: Trained, plan: Plan) -> Path:
    """Write the artifact into the run folder; stock PEFT opens it as it is."""
    return write_artifact(
        result.model,
        result.tokenizer,
        RunFolder(plan.folder).adapter,
        base=identify_base(plan.model, plan.recipe.model.revision),
        recipe_yaml=dump(plan.recipe),
        results=result.results(),
        coverage=result.counts,
        rows=result.rows,
    )
