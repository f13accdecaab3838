"""Training an adapter: TRL's trainer set up from the recipe, run, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from toolkit.architecture import describe
from toolkit.errors import ResourceError, first_line, out_of_memory
from toolkit.mtp.training import learn_after
from toolkit.ops import keep_up_outputs
from toolkit.ops.document_attention import NoMasks, per_document_attention
from toolkit.processes import is_first, processes
from toolkit.training.adapter_steps import AdapterSteps, RunContext
from toolkit.training.callbacks import KeepBest, MetricsLog, ProgressDisplay, UnmovedAdapters
from toolkit.training.checkpoint import Checkpoint, Resume, every_checkpoint, newest_checkpoint
from toolkit.training.divergence import StepGuard, name_examples
from toolkit.training.memory import peak_of, within_memory
from toolkit.training.packing import isolate_documents, leaks
from toolkit.training.preference import Pairs, PreferenceSteps, PreferenceTrainer, dpo_config
from toolkit.training.reference import take_reference
from toolkit.training.reference_free import ReferenceFreeTrainer
from toolkit.training.rollout_steps import rollout_trainer
from toolkit.training.scores import ScoredSteps
from toolkit.training.trainer import AdapterTrainer
from toolkit.training.unpaired import KtoSteps, answers_of, kto_config, weight_advice

__all__ = ["TrainResult", "same_each_time", "sft_config", "train_adapter"]

_NOT_TRL = {
    "method", "loss_type", "label_smoothing_factor", "loraplus_lr_ratio", "packing", "max_length", "use_cpu",
    "max_nonfinite_steps", "load_best_model_at_end", "early_stopping_patience",
}  # fmt: skip
"""Fields of the recipe's training section that are ours, or decided by what is given beside them."""


@dataclass(frozen=True)
class TrainResult:
    """How training went: steps, mean loss, seconds, real tokens, peak memory in bytes, steps left out and planned."""

    steps: int
    loss: float
    seconds: float
    tokens: int
    peak_memory: int
    resumed_from: int
    best_step: int | None = None
    skipped: int = 0
    planned_steps: int = 0


def train_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
    context: RunContext,
) -> TrainResult:
    """Train the adapter in `model`; goes on from a checkpoint in the context's folder if there is one.

    Args:
        train: rows of `input_ids` and `labels`; packed here by TRL where `arguments["packing"]`. Where the context has
            a preference, rows 2n and 2n+1 are the chosen and the rejected answer of a pair; or, for KTO, each row is an
            answer and a column `desirable` says whether it is good.
        validation: rows to look at meanwhile.

    Raises:
        ModelError: packed examples would see each other. DivergedError: the loss stopped being finite.
        ResourceError: the longest batch does not fit, or memory or disk ran out.
        PreemptedError, InterruptedRunError: a signal came; the run is saved.
    """
    console, head, best = context.console, context.head, context.best
    resume = context.resume or Resume({}, _newest(context))
    log = MetricsLog(context.metrics, context.device)
    trainer = _trainer(model, tokenizer, train, validation, context, log)
    keeper = KeepBest(best, model) if best else None
    if keeper:
        trainer.add_callback(keeper)
    places = _namer(train, context)
    guard = StepGuard(context.arguments["max_nonfinite_steps"], places, console.print)
    _look_first(trainer, context, resume)
    saved = {**context.parts, **({"mtp": context.head_beside} if context.head_beside else {})}
    trainer.go_on_with(log, resume=resume, parts=saved, guard=guard, stop=context.stop)
    trainer.add_callback(UnmovedAdapters(console))
    _tell_of_balance(trainer, context)
    if trainer.beside:
        trainer.add_callback(trainer.beside)
    if resume.checkpoint:
        console.print(f"resuming from {resume.checkpoint.path.name}", markup=False)
    with peak_of(context.device) as peak, _around_steps(trainer, context):
        output = _run(trainer, resume.checkpoint)
        trainer.take_average()
        if head is not None and context.head_stage == "after":
            console.print(f"multi-token-prediction head: {trainer.state.global_step} steps after the adapter")
            learn_after(head, trainer, trainer.state.global_step)
    # TRL leaves router logits switched on, and generation then fails on its growing attention mask.
    model.config.get_text_config().output_router_logits = False
    found = _best(keeper, console, trainer.state.max_steps) if keeper else None
    return TrainResult(
        steps=trainer.state.global_step,
        loss=guard.mean(output.training_loss, trainer.state.global_step),
        seconds=float(output.metrics["train_runtime"]),
        tokens=trainer.tokens_trained,
        peak_memory=peak.bytes,
        resumed_from=resume.checkpoint.step if resume.checkpoint else 0,
        best_step=found[0] if found else None,
        skipped=guard.skipped,
        planned_steps=trainer.state.max_steps,
    )


@contextmanager
def _around_steps(trainer: AdapterSteps, context: RunContext) -> Iterator[None]:
    """What holds while steps are taken."""
    with ExitStack() as stack:
        stack.enter_context(same_each_time(context.device))
        if context.arguments["packing"]:
            stack.enter_context(_isolated(trainer.model, context.console))
        if isinstance(trainer, ScoredSteps):
            stack.enter_context(trainer.sharing())
        if trainer.beside:
            stack.enter_context(trainer.beside)
        yield


@contextmanager
def same_each_time(device: str) -> Iterator[None]:
    """Within the block a card computes the same numbers each time: a run that goes on is then the one without a stop.

    FlashAttention's backward and some of torch's scatters add in whatever order threads come, unless they are told not
    to. What has no such form stays as it is. `device` is cuda or cpu; a processor needs nothing.
    """
    if device != "cuda":
        yield
        return
    filling: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = False  # of use to find mistakes, at the price of a write to every new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        filling.fill_uninitialized_memory = filled


def _trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
    context: RunContext,
    log: MetricsLog,
) -> AdapterSteps:
    """TRL's trainer with what the context asks for, before a checkpoint is read into it."""
    arguments, console = context.arguments, context.console
    keep_up_outputs(model, arguments["gradient_checkpointing"])
    balanced = context.train_router and _name_experts_for_trl(model)
    given = {
        "model": model,
        "processing_class": tokenizer,
        "callbacks": [log, ProgressDisplay(console, log)] if is_first() else [],
    }
    evaluates = validation is not None
    trainer: AdapterSteps
    if context.preference:
        arguments = common_arguments(context, train_router=balanced, evaluates=evaluates)
        trainer = _preference_trainer(context, context.preference.method, train, validation, arguments, given)
    elif context.rollouts:
        arguments = common_arguments(context, train_router=balanced, evaluates=bool(context.rollouts.held_out))
        trainer = rollout_trainer(context, arguments, **given)
    else:
        config = sft_config(context, train_router=balanced, evaluates=evaluates)
        trainer = AdapterTrainer(context, args=config, train_dataset=train, eval_dataset=validation, **given)
    if processes() > 1:
        sequences = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * processes()
        what = "pairs" if isinstance(trainer, PreferenceTrainer) else "sequences"
        console.print(f"processes: {processes()}, {sequences} {what} per step")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _namer(train: Dataset, context: RunContext) -> Callable[[Mapping[str, Any]], list[str]]:
    """What names the examples of a batch."""
    asked = context.rollouts
    if asked is None:
        return partial(name_examples, train, context.places)
    return lambda batch: list(dict.fromkeys(asked.question(number).place for number in batch["asked"].tolist()))


def _preference_trainer(
    context: RunContext,
    method: str,
    train: Dataset,
    validation: Dataset | None,
    arguments: Mapping[str, Any],
    given: Mapping[str, Any],
) -> PreferenceSteps:
    if method == "kto":
        config = kto_config(context, arguments)
        answers = partial(answers_of, together=config.per_device_train_batch_size, loss_type=config.loss_type)
        held_out, trained = answers(validation) if validation else None, answers(train)
        if advice := weight_advice(trained, vars(config)):
            context.console.print(advice, highlight=False, markup=False)
        return KtoSteps(context, train=trained, held_out=held_out, args=config, **given)
    kind = PreferenceTrainer if method == "dpo" else ReferenceFreeTrainer
    pairs = Pairs(validation) if validation else None
    return kind(context, train=Pairs(train), held_out=pairs, args=dpo_config(context, arguments), **given)


def _best(keeper: KeepBest, console: Console, planned: int) -> tuple[int, float] | None:
    """Put the best adapter back where that is wanted; its step and figure. Tells of it, and of an early stop."""
    if why := keeper.why_stopped(planned):
        console.print(why, highlight=False)
    if found := keeper.restore():
        console.print(f"best: step {found[0]}, {keeper.wanted.metric} {found[1]:.4f}; its adapter is kept")
    return found


def _newest(context: RunContext) -> Checkpoint | None:
    return newest_checkpoint(
        context.folder, lambda why: context.console.print(f"checkpoint skipped: {why}", markup=False)
    )


def _tell_of_balance(trainer: AdapterSteps, context: RunContext) -> None:
    if context.train_router and not trainer.aux_loss_enabled:
        context.console.print(
            "router: no load-balancing loss; transformers computes none for this family, or its weight is 0"
        )


def _look_first(trainer: AdapterSteps, context: RunContext, resume: Resume) -> None:
    """See whose logits TRL's head computes; and, of preferences, what the model gives the answers."""
    if not trainer.check_fused_head():
        trainer.say(
            "logits: TRL's fused head passes over what this family does to its own; the family's are computed instead"
        )
    if isinstance(trainer, ScoredSteps):
        with within_memory("a look at two examples", trainer.advice):
            trainer.look_for_shared_prompts()
    if isinstance(trainer, PreferenceSteps) and trainer.needs_reference and context.preference:
        with trainer.sharing():
            take_reference(trainer, context.preference, resume, trainer.say)


def _run(trainer: AdapterSteps, checkpoint: Checkpoint | None) -> Any:
    """Train; memory that runs out becomes one line that says what is kept."""
    try:
        with trainer.stop.until_saved():
            return trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        last = next((path.name for path in every_checkpoint(Path(trainer.args.output_dir))), None)
        kept = f"{last} is kept: close other programs and rerun; or start a new run with" if last else ""
        raise ResourceError(
            f"step {trainer.state.global_step + 1}: out of memory ({first_line(error)[:120]}); "
            f"{kept or 'nothing is saved yet: close other programs and rerun, or set'} lower training.max_length, "
            "training.per_device_train_batch_size or lora.r"
        ) from error


@contextmanager
def _isolated(model: PeftModel, console: Console) -> Iterator[None]:
    """No packed example sees another within the block, which is proven first."""
    with per_document_attention(model) as alone:
        how = ", attention per example" if alone else ""
        is_mended = isolate_documents(model)
        how += " (with onecard's masks)" if is_mended else ""
        console.print(f"packing: no example sees another, checked{how}")
        with NoMasks(model) if alone and not is_mended else nullcontext() as bare:
            if bare is not None and bare.is_on:
                bare.is_on = not leaks(model)
            yield


def _name_experts_for_trl(model: PeftModel) -> bool:
    """Whether TRL can compute the load-balancing loss: it reads expert counts under fixed names.

    A config that keeps the number of experts under another name is given TRL's, in memory only.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "num_experts"):
        config.num_experts = describe(model).layers[0].num_experts
    return hasattr(config, "num_experts_per_tok")


def sft_config(context: RunContext, *, train_router: bool, evaluates: bool) -> SFTConfig:
    """TRL's configuration from the recipe's training fields; `train_router` switches the load-balancing loss on."""
    arguments = context.arguments
    return SFTConfig(
        **common_arguments(context, train_router=train_router, evaluates=evaluates),
        packing=arguments["packing"],
        loss_type=arguments["loss_type"],
        max_length=arguments["max_length"],
        eval_packing=False,
        packing_strategy="bfd",
        # Rows come cut and masked; only packing is left to do.
        dataset_kwargs={"skip_prepare_dataset": not arguments["packing"]},
        shuffle_dataset=False,
    )


def common_arguments(context: RunContext, *, train_router: bool, evaluates: bool) -> dict[str, Any]:
    """What every method's configuration is given."""
    arguments, device, dtype = context.arguments, context.device, context.dtype
    given = {key: value for key, value in arguments.items() if key not in _NOT_TRL}
    coefficient = given.pop("router_aux_loss_coef")
    checkpointing = given.pop("gradient_checkpointing")  # transformers' new name for it is activation_checkpointing
    max_steps, eval_steps = given.pop("max_steps"), given.pop("eval_steps")
    when = "steps" if evaluates and eval_steps else "no"  # at an epoch's end the trainer looks itself, before saving
    return {
        **given,
        "output_dir": str(context.folder),
        "max_steps": max_steps or -1,
        "eval_strategy": when,
        "eval_steps": eval_steps,
        "router_aux_loss_coef": coefficient if train_router else 0.0,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": device == "cpu",
        "activation_checkpointing": checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": device == "cuda",
        "prediction_loss_only": True,
        "data_seed": given["seed"],
        # A stack's adapter is one tensor, so none is left out of a step; looking for such would cost one pass a step.
        "ddp_find_unused_parameters": False,
    }
