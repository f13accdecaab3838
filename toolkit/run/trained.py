"""From an adapted model to a finished run: resume, train, package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from toolkit.adapters import unmoved_adapters
from toolkit.artifact import check_folder, fetch_adapter, read_manifest, write_artifact
from toolkit.artifact import require_packageable as may_be_packaged
from toolkit.artifact.manifest import file_entry
from toolkit.checkpoint.identity import BaseIdentity, config_sha256, files_of, identify_base, license_of
from toolkit.data import Batches, Dialogue
from toolkit.errors import ModelError, RecipeError
from toolkit.evaluate import LOSS, Comparison, find_metric, score_now
from toolkit.labels import IGNORED
from toolkit.mtp.cost import most_answers
from toolkit.mtp.head import MtpHead
from toolkit.mtp.head_file import head_state
from toolkit.plan import ROUNDED_ROWS, Plan, free_memory, nearest_change
from toolkit.processes import StopRequest, is_first
from toolkit.recipe import PAIR_METRICS, REWARD, dump, flat
from toolkit.run.data import held_out, stop_as_trained
from toolkit.run.evaluation import LOOKED_AT, evaluate, look_at_experts, require_harmless_rounding, tell_unsure_end
from toolkit.run.folder import bind, data_sha256, find_resume, require_disk, tokenizer_sha256, versions
from toolkit.run.model import coverage
from toolkit.run.mtp import drafting_head, evaluate_head, make_head, teach_own_answers
from toolkit.run.rewards import rewards_sha256, rollouts_of, start_sha256
from toolkit.run.vocabulary import told_tokens
from toolkit.run_folder import RunFolder
from toolkit.steps import part
from toolkit.training import BestAdapter, Preference, RunContext, TrainResult, train_adapter
from toolkit.training.checkpoint import Resume
from toolkit.training.memory import peak_of
from toolkit.training.reference import START

__all__ = ["Trained", "TrainedText", "find_checkpoint", "judge", "package", "require_packageable", "train"]


_MARGIN = 64 << 20
"""Bytes for everything small that a run writes."""


@dataclass(frozen=True)
class TrainedText:
    """The trained text of each example, decoded as it is asked for."""

    tokenizer: PreTrainedTokenizerBase
    examples: Dataset

    def __iter__(self) -> Iterator[str]:
        for rows in self.examples.iter(1_000):
            pairs = [zip(*row, strict=True) for row in zip(rows["input_ids"], rows["labels"], strict=True)]
            trained = [[token for token, label in pair if label != IGNORED] for pair in pairs]
            yield from (text.strip() for text in self.tokenizer.batch_decode(trained, skip_special_tokens=True))


@dataclass(frozen=True)
class Trained:
    """A trained adapter still on its model, with all that was counted and measured."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    training: TrainResult
    counts: dict[str, Any]
    comparison: Comparison | None = None
    rows: TrainedText | None = None
    """What the answers of the training data say: none of it may leave with the artifact."""
    head: MtpHead | None = None
    drafting: dict[str, Any] | None = None
    evaluation_peak: int = 0
    """Bytes at the highest while base and adapted model were compared, as `TrainResult.peak_memory`."""
    sides: int = 1
    """Rows of `rows` that an example is: a pair's two, else one."""
    chat: Mapping[str, Any] | None = None
    """How conversations were written and what ended them, as `write_artifact` takes it."""

    def results(self) -> dict[str, Any]:
        """Figures that the same recipe gives again: training loss and steps, base against adapted."""
        run = self.training
        examples = {"examples": len(self.rows.examples) // self.sides} if self.rows else {}
        figures = {"training": {"loss": run.loss, "steps": run.steps, "tokens": run.tokens, **examples}}
        mtp = {"mtp": self.drafting} if self.drafting else {}
        return {**figures, **mtp, **(self.comparison.to_dict() if self.comparison else {})}


def require_packageable(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> None:
    """Raise where the artifact of this run would be refused for its recipe, template or tokenizer; no model needed.

    Raises:
        RecipeError: a value of the recipe, or the chat template that it names, holds a token or a path of this machine.
        ModelError: the base's tokenizer cannot be written so that it reads back the same.
    """
    may_be_packaged(tokenizer, flat(plan.recipe), files_of(plan.model, plan.recipe.model.revision))


def find_checkpoint(
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    note: Callable[[str], None] = lambda line: None,
    *,
    other_versions: bool = False,
) -> Resume:
    """The checkpoint that this run goes on from, if it may, and room for the next ones; cheap, so ask before loading.

    What is skipped or changed and allowed is noted. The base's weights are compared in `train`, once they are here.
    `other_versions`: it may have been written under other minor versions of onecard and of the libraries.

    Raises:
        ModelError: the run in the plan's folder was trained with something else, or something else than its artifact
            lies where that will be. ResourceError: the disk is too small.
    """
    run = RunFolder(plan.folder)
    adapter, kept = plan.bytes.adapter, max(2, plan.recipe.training.save_total_limit)
    integers = plan.bytes.experts + plan.bytes.linears
    compensated = integers if plan.recipe.quantization.error_compensation != "none" else 0
    # What is kept, the best one, the one being written; and the artifact, written beside an older one.
    require_disk(run.path, (kept + 2) * (adapter + plan.bytes.optimizer) + 2 * adapter + compensated + _MARGIN)
    found = find_resume(run.checkpoints, note)
    bind(
        found,
        note,
        other_versions=other_versions,
        recipe=flat(plan.recipe),
        data=data_sha256(batches.train),
        examples=len(batches.train),
        tokenizer=tokenizer_sha256(tokenizer),
        versions=versions(),
        device=plan.device,
        dtype=plan.dtype,
        backend=plan.backend,
    )
    _require_place(run.adapter, plan, weights=found.checkpoint is None)
    return found


@part("train", drawn=False)
def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    plan: Plan,
    console: Console | None = None,
    resumed: Resume | None = None,
    stop: StopRequest | None = None,
) -> Trained:
    """Train the adapter; `judge` compares it with its base.

    Goes on from a checkpoint in the plan's folder: `resumed`, or what `find_checkpoint` finds.

    Raises:
        ModelError: an adapter did not move, or the checkpoint was trained on another base.
        DivergedError: the loss stopped being finite. ResourceError: memory or disk ran out.
        RecipeError: int8 rows were asked for and raise the loss too far.
    """
    console = console or Console(quiet=True)
    note = partial(console.print, highlight=False, markup=False)
    stop_as_trained(model.get_base_model(), batches.form)
    if resumed is None:
        require_packageable(tokenizer, plan)
        resumed = find_checkpoint(plan, tokenizer, batches, note)
    base = _base_facts(plan)
    bind(resumed, note, **base, rewards=rewards_sha256(plan.recipe, batches), start=start_sha256(plan.recipe))
    if plan.backend == ROUNDED_ROWS:
        looked_at = held_out(batches, plan) or batches.train.select(range(min(len(batches.train), LOOKED_AT)))
        require_harmless_rounding(model, looked_at, plan.recipe.eval.batch_size)
    head = make_head(model, plan)
    with rollouts_of(model, tokenizer, batches, plan, drafting_head(head, plan, note), note) as rollouts:
        context = RunContext(
            **_settings(plan),
            console=console,
            best=_wanted_best(model, tokenizer, batches, plan),
            probes=_probes(plan, note),
            resume=resumed,
            stop=stop or StopRequest(),
            places=batches.places,
            head=head if plan.recipe.mtp.reads_data else None,
            preference=_preference(plan, base) if batches.judged else None,
            rollouts=rollouts,
        )
        training = train_adapter(model, tokenizer, batches.train, held_out(batches, plan), context)
    counts = coverage(model, plan)
    _require_moved(model, counts, training, written=bool(batches.questions))
    if head is not None and most_answers(plan.recipe):
        teach_own_answers(head, tokenizer, batches, plan, console)
    return Trained(
        model=model,
        tokenizer=tokenizer,
        training=training,
        counts=counts,
        rows=TrainedText(tokenizer, batches.train),
        sides=2 if batches.pairs else 1,
        head=None if head is None else head.head.to(model.dtype).eval(),
        drafting=None if head is None else {"training": head.result().to_dict()},
        chat=batches.form.to_dict(),
    )


def _settings(plan: Plan) -> dict[str, Any]:
    """What the plan alone says of a `RunContext`."""
    recipe, run = plan.recipe, RunFolder(plan.folder)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    tracking = {"report_to": list(recipe.tracking.report_to), "run_name": recipe.tracking.run_name or plan.folder.name}
    return {
        "folder": run.checkpoints,
        "metrics": run.metrics,
        "arguments": {**recipe.training.model_dump(exclude={"output_dir"}), **tracking},
        "device": plan.device,
        "dtype": plan.dtype,
        "train_router": recipe.lora.router,
        "advice": plan.changes[0].what if plan.changes else nearest_change(recipe),
        "micro_batches_per_pass": plan.micro_batches_per_pass,
        "head_stage": recipe.mtp.stage,
        "telemetry": recipe.tracking.telemetry,
    }


def _preference(plan: Plan, base: Mapping[str, Any]) -> Preference:
    """What a preference run is told beside its pairs."""
    run, start, method = RunFolder(plan.folder), plan.recipe.lora.adapter_name_or_path, plan.recipe.training.method
    options = getattr(plan.recipe, method).model_dump()
    weights = fetch_adapter(start) / "adapter_model.safetensors" if start else None
    facts = {
        **{name: str(base[name]) for name in ("base", "config", "compensated")},
        "dtype": plan.dtype,
        "ld_alpha": str(options.get("ld_alpha")),
        START: file_entry(weights)["sha256"] if weights else "",
    }
    forked = run.forked_reference if start and Path(start) == run.start.absolute() else None
    return Preference(options, run.reference, facts, forked if forked and forked.is_file() else None, method)


@part("compare", drawn=False)
def judge(trained: Trained, batches: Batches, plan: Plan, console: Console | None = None) -> Trained:
    """Compare the adapter, and its head, with the base on the held-out examples, in the first process."""
    if not is_first():
        return trained
    model = trained.model
    with peak_of(plan.device) as peak:
        compared = evaluate(model, trained.tokenizer, batches, plan)
        drafting = evaluate_head(model, trained.head, batches, plan, console)
        look_at_experts(model, batches, plan)
        unsure = tell_unsure_end(model, trained.tokenizer, batches, plan)
    if unsure and console:
        console.print(f"note  {unsure}", highlight=False, markup=False)
    drafting = {**(trained.drafting or {}), **(drafting or {})} or None
    return replace(trained, comparison=compared, drafting=drafting, evaluation_peak=peak.bytes)


def _require_moved(model: PeftModel, counts: Mapping[str, Any], training: TrainResult, *, written: bool) -> None:
    moved, adapters = counts["adapters moved"]
    if moved == adapters:
        return
    if training.best_step is not None and training.best_step < training.steps:
        raise ModelError(
            f"the best evaluation is that of step {training.best_step}, where {moved} of {adapters} adapters had "
            "moved: training made it worse; lower training.learning_rate or look at eval.metric"
        )
    still = unmoved_adapters(model)
    advice = "; raise training.learning_rate, or train longer"
    if written:
        advice += "; where all answers to a prompt have one reward (frac_reward_zero_std), nothing is learnt from them"
    raise ModelError(
        f"only {moved} of {adapters} adapters moved in {training.steps} steps, not {', '.join(still[:3])}"
        f"{', …' if len(still) > 3 else ''}{advice}"
    )


def _require_place(adapter: Path, plan: Plan, *, weights: bool) -> None:
    """The artifact's place is free or holds this run's; a checkpoint says which weights these are, without one they are
    compared. Where the base is not here yet, no run can have ended here."""
    if not adapter.exists() or (adapter.is_dir() and not any(adapter.iterdir())):
        return
    try:
        there = None if weights else BaseIdentity(**read_manifest(adapter)["base"])
    except (ModelError, TypeError):
        there = None
    try:
        base = there or identify_base(plan.model, plan.recipe.model.revision)
    except ModelError:
        return
    check_folder(adapter, base=base, recipe_yaml=dump(plan.recipe))


def _probes(plan: Plan, note: Callable[[str], None]) -> bool:
    """Whether the longest batch goes first: not where twice what the plan needs is free beside what is loaded."""
    if 2 * plan.bytes.total > free_memory(plan.device):
        return True
    note("memory: over twice the planned need is free, so the longest batch is not tried first")
    return False


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
        raise RecipeError("training.load_best_model_at_end: needs held-out examples; add data.validation_size=0.1")
    own = wanted.metric not in (LOSS, REWARD, *PAIR_METRICS)
    score = partial(
        score_now,
        model,
        tokenizer,
        questions,
        metric=wanted.metric,
        max_new_tokens=wanted.max_new_tokens,
        batch_size=wanted.batch_size,
        read=Dialogue(tokenizer, batches.form).judged,
    )
    return BestAdapter(
        plan.folder,
        find_metric(wanted.metric)[0] if own else wanted.metric,
        lower=wanted.metric == LOSS,
        score=score if own else None,
        patience=training.early_stopping_patience,
        restore=training.load_best_model_at_end,
    )


def _base_facts(plan: Plan) -> dict[str, Any]:
    kept = RunFolder(plan.folder).compensated
    base = identify_base(plan.model, plan.recipe.model.revision)
    return {
        "commit": base.revision,
        "base": base.weights_sha256,
        "config": config_sha256(plan.model, plan.recipe.model.revision),
        "compensated": file_entry(kept)["sha256"] if kept.is_file() else None,
        "stacks": dict(plan.stacks) or None,
    }


@part("package")
def package(result: Trained, plan: Plan, pictures: Mapping[str, bytes] | None = None) -> Path:
    """Write the artifact into the run folder; stock PEFT opens it as it is.

    `pictures` are PNG files for the model card, as `toolkit.report.charts` draws them.
    """
    base, revision = plan.model, plan.recipe.model.revision
    return write_artifact(
        result.model,
        result.tokenizer,
        RunFolder(plan.folder).adapter,
        base=identify_base(base, revision),
        license=plan.recipe.hub.license or license_of(base, revision),
        pictures=pictures,
        recipe_yaml=dump(plan.recipe),
        results=result.results(),
        coverage=result.counts,
        rows=result.rows or (),
        chat=result.chat,
        base_folder=files_of(base, revision),
        stacks=plan.stacks,
        new_tokens=told_tokens(result.tokenizer, plan),
        mtp_head=None if result.head is None else head_state(result.head, result.model.get_base_model()),
    )
