"""The one flow: plan -> load -> attach -> build_batches -> train -> package, each step a function of the plan.

These are the public verbs. They only hand the plan's fields to the rooms, which take plain arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from toolkit.adapters import adapter_coverage, attach_lora, load_adapter
from toolkit.data import Batches, read_chat_template
from toolkit.data import build_batches as build_from_rows
from toolkit.errors import ModelError, first_line
from toolkit.evaluate import Comparison, compare, held_out_loss, measure_drafts
from toolkit.mtp import HeadTraining, MtpHead, can_speculate, head_state, load_native, native_keys, new_head, read_head
from toolkit.ops import BACKENDS
from toolkit.packaging import identify_base, write_artifact
from toolkit.plan import BACKENDS as PLANNED
from toolkit.plan import ROUNDED_ROWS, Plan
from toolkit.quant import load_int8, measure
from toolkit.quant.calibrate import Compensation, compensate_model
from toolkit.quant.keep import read_compensated, write_compensated
from toolkit.recipe import dump
from toolkit.training import RunFolder, TrainResult, train_adapter

__all__ = [
    "Trained",
    "attach",
    "build_batches",
    "compensate",
    "coverage",
    "evaluate",
    "evaluate_head",
    "load",
    "load_tokenizer",
    "make_head",
    "package",
    "reopen",
    "reopen_head",
    "train",
]

_NOT_TRL = {"output_dir"}
_DRAFTED, _DRAFTED_TOKENS = 24, 32
"""Held-out prompts that drafting is measured on, and the shortest text written after each."""
_LOOKED_AT = 64
"""Training examples that stand in where none are held out."""


@dataclass(frozen=True)
class Trained:
    """A trained adapter still on its model, with all that was counted and measured."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    training: TrainResult
    counts: dict[str, Any]
    comparison: Comparison | None
    head: MtpHead | None = None
    drafting: dict[str, Any] | None = None

    def results(self) -> dict[str, Any]:
        """Figures that the same recipe gives again: training loss and steps, base against adapted."""
        run = self.training
        figures = {"training": {"loss": run.loss, "steps": run.steps, "tokens": run.tokens}}
        mtp = {"mtp": self.drafting} if self.drafting else {}
        return {**figures, **mtp, **(self.comparison.to_dict() if self.comparison else {})}


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


def load(plan: Plan) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen int8 model, quantised as its shards stream in, and its tokenizer."""
    if plan.backend not in BACKENDS:
        raise ModelError(f"{plan.backend}: no such expert backend; there are {', '.join(BACKENDS)}")
    tokenizer = load_tokenizer(plan)
    model, _ = load_int8(
        plan.model,
        revision=plan.recipe.model.revision,
        dtype=plan.torch_dtype,
        device=plan.device,
        experts=plan.recipe.quantization.experts,
        linears=plan.recipe.quantization.linears,
        attn_implementation=plan.recipe.model.attn_implementation,
        experts_implementation=plan.backend,
    )
    return model, tokenizer


def compensate(model: PreTrainedModel, batches: Batches, plan: Plan, kept: Path | None = None) -> Compensation | None:
    """Round the int8 parts again with error feedback, on training examples, where the recipe asks for it.

    `kept` is a file of integers: read where it is there, so that a resumed run has the same base, written otherwise.
    """
    wanted = plan.recipe.quantization
    if wanted.error_compensation == "none":
        return None
    if kept and kept.is_file():
        return read_compensated(model, kept)
    examples = batches.train[: wanted.calibration_samples]["input_ids"]
    report = compensate_model(model, plan.model, examples, revision=plan.recipe.model.revision)
    if kept:
        write_compensated(model, report, kept)
    return report


def attach(model: PreTrainedModel, plan: Plan) -> PeftModel:
    """LoRA on experts, router and linears, as the recipe says; fresh, or from an adapter on disk."""
    lora = plan.recipe.lora
    set_seed(plan.recipe.training.seed)
    if lora.adapter_name_or_path:
        return load_adapter(model, lora.adapter_name_or_path, is_trainable=True)
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
            read_compensated(model, kept)
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


def build_batches(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Batches:
    """The recipe's examples, validated and masked; TRL packs them."""
    data = plan.recipe.data.model_dump(exclude={"chat_template_path"})
    training = plan.recipe.training
    return build_from_rows(tokenizer, **data, max_length=training.max_length, seed=training.seed)


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    plan: Plan,
    console: Console | None = None,
) -> Trained:
    """Train the adapter and compare it with its base on the held-out examples.

    Raises:
        ModelError: an adapter did not move. DivergedError: the loss stopped being finite.
        RecipeError: int8 rows were asked for and raise the loss too far.
    """
    console = console or Console(quiet=True)
    if plan.backend == ROUNDED_ROWS:
        looked_at = _held_out(batches, plan) or batches.train.select(range(min(len(batches.train), _LOOKED_AT)))
        require_harmless_rounding(model, looked_at, plan.recipe.eval.batch_size)
    recipe, run = plan.recipe, RunFolder(plan.folder)
    tracking = {"report_to": list(recipe.tracking.report_to), "run_name": recipe.tracking.run_name or plan.folder.name}
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    head = make_head(model, plan)
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
        head=head,
        head_stage=recipe.mtp.stage,
    )
    counts = coverage(model, plan)
    moved, adapters = counts["adapters moved"]
    if moved != adapters:
        raise ModelError(
            f"only {moved} of {adapters} adapters moved in {training.steps} steps; raise training.learning_rate, or "
            "train longer"
        )
    comparison = evaluate(model, tokenizer, batches, plan)
    finished = None if head is None else head.head.to(model.dtype).eval()
    drafting = evaluate_head(model, finished, batches, plan, console)
    if head is not None:
        drafting = {"training": head.result().to_dict(), **(drafting or {})}
    return Trained(model, tokenizer, training, counts, comparison, finished, drafting)


def make_head(model: PeftModel, plan: Plan) -> HeadTraining | None:
    """The multi-token-prediction head that the recipe asks for, the checkpoint's own or a new one, and its training."""
    wanted, training = plan.recipe.mtp, plan.recipe.training
    if not wanted.enabled:
        return None
    base = model.get_base_model()
    native = native_keys(plan.model, base.config, revision=plan.recipe.model.revision)
    head = (
        load_native(base, native)
        if native
        else new_head(base, num_mtp_layers=wanted.num_mtp_layers, seed=training.seed)
    )
    return HeadTraining(
        head,
        model,
        depth=max(wanted.depth, len(head.layers)),
        kind=wanted.loss,
        loss_weight=wanted.loss_weight,
        learning_rate=wanted.head_learning_rate,
        max_grad_norm=training.max_grad_norm,
    )


def reopen_head(model: PeftModel, plan: Plan, artifact: str | Path) -> MtpHead:
    """The head of a finished artifact, for decoding.

    Raises:
        ModelError: it has none, the file is damaged, or it is the head of another base.
    """
    base = model.get_base_model()
    native = native_keys(plan.model, base.config, revision=plan.recipe.model.revision)
    return read_head(artifact, base, native)


def evaluate_head(
    model: PeftModel, head: MtpHead | None, batches: Batches, plan: Plan, console: Console | None = None
) -> dict[str, Any] | None:
    """Drafts of the head on held-out prompts, and of the checkpoint's own head as it was, before and after training.

    A native head that was not trained is measured too, and its loss of acceptance is said on the console.
    """
    base, recipe = model.get_base_model(), plan.recipe
    prompts = [question.prompt_ids for question in batches.held_out[:_DRAFTED]]
    native = native_keys(plan.model, base.config, revision=recipe.model.revision)
    if not prompts or not recipe.eval.enabled or can_speculate(base) or (head is None and native is None):
        return None
    length = max(_DRAFTED_TOKENS, recipe.eval.max_new_tokens)
    count = max(recipe.mtp.depth, len(head.layers) if head else 1)
    measured: dict[str, Any] = {}
    if native is not None:
        stale = load_native(base, native).to(model.dtype).eval()
        for name, adapted in (("base", False), ("stale", True)):
            found = measure_drafts(model, stale, prompts, count=count, max_new_tokens=length, adapted=adapted)
            measured[name] = found.to_dict()
    if head is not None:
        measured["trained"] = measure_drafts(model, head, prompts, count=count, max_new_tokens=length).to_dict()
    elif console is not None:
        before, after = (measured[name]["tau"] for name in ("base", "stale"))
        console.print(
            f"warning: this checkpoint's multi-token-prediction head no longer fits the adapted model: {after:.2f} "
            f"tokens a pass, {before:.2f} before; mtp.enabled=true trains it along"
        )
    return measured


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
        max_new_tokens=wanted.max_new_tokens,
        batch_size=wanted.batch_size,
    )


def _held_out(batches: Batches, plan: Plan) -> Dataset | None:
    """The held-out sequences that the recipe wants looked at."""
    if batches.validation is None:
        return None
    return batches.validation.select(range(min(len(batches.validation), plan.recipe.eval.max_samples or 1 << 40)))


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
        mtp_head=None if result.head is None else head_state(result.head, result.model.get_base_model()),
    )
