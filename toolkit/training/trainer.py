"""TRL's `SFTTrainer` with the promises of this project: no silent NaN, no leaking checkpoint, metrics as lines.

Packing, chunked loss, token-normalised accumulation, load-balancing loss, schedules and trackers are TRL's and
transformers' own. TRL packs with position ids that restart at each example, from which transformers builds a
block-diagonal mask for every attention backend.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from toolkit.architecture import describe
from toolkit.errors import DivergedError, ResourceError, first_line, out_of_memory
from toolkit.labels import IGNORED
from toolkit.mtp.callback import HeadSteps, learn_after
from toolkit.ops import keep_up_outputs
from toolkit.ops.document_attention import keep_lengths, per_document_attention
from toolkit.ops.label_logits import (
    entropy_and_hits,
    forward_inputs,
    label_logits,
    pays_to_keep_logits,
    summed_loss,
)
from toolkit.ranks import broadcast, is_first, processes
from toolkit.training.best import KeepBest
from toolkit.training.checkpoint import Checkpoint, Resume, every_checkpoint, newest_checkpoint
from toolkit.training.context import RunContext
from toolkit.training.divergence import StepGuard, name_examples
from toolkit.training.layer_major import LayerMajorSteps, layer_major_for
from toolkit.training.memory import peak_of
from toolkit.training.packing import isolate_documents
from toolkit.training.probe import longest_rows, probe
from toolkit.training.progress import MetricsLog, ProgressDisplay, UnmovedAdapters
from toolkit.training.resumable import ResumableTrainer

__all__ = ["AdapterTrainer", "TrainResult", "sft_config", "train_adapter"]


_LENGTHS, _TOKENS = "document_lengths", "real_tokens"
"""Keys of a batch, between collator and trainer."""
_NOT_TRL = {"use_cpu", "max_nonfinite_steps", "load_best_model_at_end", "early_stopping_patience"}
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


class _Counting:
    """TRL's collator; a batch also brings as numbers what a card would be asked for: lengths of documents, tokens."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        if "cu_seq_lens_q" in batch:
            batch[_LENGTHS] = batch["cu_seq_lens_q"].diff().tolist()
        if "attention_mask" in batch:
            batch[_TOKENS] = int(batch["attention_mask"].sum())
        return batch


def _real_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a batch that are no padding."""
    mask = inputs.get("attention_mask")
    told: int | None = getattr(inputs["input_ids"], _TOKENS, None)
    if mask is None:
        return int(inputs["input_ids"].numel())
    return int(mask.sum()) if told is None else told


class AdapterTrainer(LayerMajorSteps, ResumableTrainer):
    """TRL's loss, no more computed than is needed, and none that is not finite."""

    aux_loss_enabled: bool
    data_collator: Callable[[list[Any]], dict[str, Any]]
    _metrics: dict[str, dict[str, list[float]]]
    wants_trls_balance = False
    """The family's own forward gives no load-balancing loss, so TRL's way is taken from the first batch on."""
    _logits: torch.Tensor | None = None

    def __init__(self, context: RunContext, **trl: Any) -> None:
        """`trl`: what TRL's trainer takes."""
        super().__init__(**trl)
        self.data_collator = _Counting(self.data_collator)
        arguments, head = context.arguments, context.head
        self.score: Callable[[], Mapping[str, float]] | None = context.best.score if context.best else None
        """Figures of the model as it stands that an evaluation has beside the loss."""
        self.probe_advice = context.advice if context.probes else None
        """What to change where the longest batch does not fit; None runs no probe."""
        self.layer_major = None if head else layer_major_for(trl["model"], arguments, context.micro_batches_per_pass)
        self.evaluates_each_epoch = trl["eval_dataset"] is not None and not arguments["eval_steps"]
        beside = context.head_beside
        self.beside = HeadSteps(beside, arguments["learning_rate"]) if beside else None
        """The multi-token-prediction head that learns from the same batches."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """TRL's loss, checked; on a CPU, where TRL computes the logits of all tokens, that of the labelled ones."""
        result: torch.Tensor | tuple[torch.Tensor, Any] | None = None
        self._logits = None
        if not return_outputs and self._pays_to_keep_logits(inputs["labels"]):
            result = self._labelled_loss(model, inputs, **kwargs)
        elif not return_outputs and self.model.training and self._would_wait(inputs["labels"]):
            result = self._fused_loss(model, inputs, **kwargs)
        if result is None:
            result = super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if self.model.training:
            count = _real_tokens(inputs)
            if processes() > 1:
                count = int(self.accelerator.reduce(torch.tensor(count, device=loss.device)))
            self.tokens_trained += count
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self.tokens_trained]
        if self.model.training:
            guarded: torch.Tensor = self._guarded(result, inputs, loss, kwargs.get("num_items_in_batch"))
            return guarded
        if not torch.isfinite(loss.detach()):
            raise DivergedError(
                f"step {self.state.global_step}: the held-out loss is {loss.item()}; look at the held-out examples, or "
                "start again with a lower training.learning_rate"
            )
        return result

    def _guarded(self, result: Any, inputs: dict[str, Any], loss: torch.Tensor, count: Any) -> Any:
        """A training loss, with what a head learns beside it; one that is not finite goes no further.

        On a card it is looked at when the step ends, with all others; what is not finite counts nothing until then.
        """
        if self._would_wait(loss) and self.beside is None:
            self.guard.note(inputs, loss.detach())
            return torch.nan_to_num(result, nan=0.0, posinf=0.0, neginf=0.0)
        if not self.guard.see(inputs, loss.detach()):
            # Without a graph nothing flows back, and the guard drops the whole step. Where processes wait for each
            # other's gradients these must come, and are not finite anywhere.
            return loss.new_zeros((), requires_grad=True) if processes() == 1 else result
        logits, self._logits = self._logits, None  # not to be held through the backward pass
        return result if self.beside is None else self.beside.learn(result, inputs, logits, count)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """transformers' own; before the first one, forward and backward of the longest batch."""
        if self.probe_advice is not None:
            advice, self.probe_advice = self.probe_advice, None
            self._probe(model, advice)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As there; the numbers that came with the batch stay on the host."""
        lengths, tokens = inputs.pop(_LENGTHS, None), inputs.pop(_TOKENS, None)
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if lengths is not None:
            keep_lengths(prepared, lengths)
        if tokens is not None:
            setattr(prepared["input_ids"], _TOKENS, tokens)
        return prepared

    def _probe(self, model: nn.Module, advice: str) -> None:
        dataset = self._remove_unused_columns(self.train_dataset, description="probe")
        rows = [dataset[index] for index in longest_rows(self.train_dataset, self.args.per_device_train_batch_size)]
        batch = self._prepare_inputs(self.data_collator(rows))
        metrics, tokens, guarded = copy.deepcopy(self._metrics), self.tokens_trained, self.guard.state()
        beside, self.beside = self.beside, None  # it learns from no batch twice

        def step() -> None:
            model.train()
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch, num_items_in_batch=(batch["labels"] != IGNORED).sum())
            self.accelerator.backward(loss)

        def forget() -> None:
            model.zero_grad(set_to_none=True)
            self._metrics, self.tokens_trained = metrics, tokens
            self.guard.restore(guarded)
            self.beside = beside

        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        held = 0 if self.state.global_step else trained * (2 if "8bit" in str(self.args.optim) else 8)
        size = batch["input_ids"].numel()
        probe(step, forget, tokens=size, held=held, device=self.args.device, advice=advice)

    @staticmethod
    def _would_wait(tensor: torch.Tensor) -> bool:
        """Whether asking for a number of it means to wait for all that is queued before."""
        return tensor.device.type != "cpu"

    def _pays_to_keep_logits(self, labels: torch.Tensor) -> bool:
        """TRL's way needs less memory where many positions are labelled, and is as fast on a card."""
        if labels.device.type != "cpu" or self.wants_trls_balance:
            return False
        positions = int((labels[:, 1:] != IGNORED).any(0).sum())
        return pays_to_keep_logits(self.model, len(labels), positions)

    def _labelled_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor | None:
        """As TRL computes it, and the same metrics; None where the family gives no load-balancing loss of its own."""
        given = forward_inputs(inputs, balanced=self.aux_loss_enabled)
        logits, targets, outputs = label_logits(model, given, inputs["labels"])
        self._logits = None if self.beside is None else logits.detach()
        balance = getattr(outputs, "aux_loss", None)
        if self.aux_loss_enabled and balance is None:
            self.wants_trls_balance = True
            return None
        metrics = self._metrics["train" if self.model.training else "eval"]
        count = torch.as_tensor(len(targets) if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        loss = summed_loss(logits, targets) / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if balance is not None and self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * balance / steps
            metrics["aux_loss"].append(float(self.accelerator.gather_for_metrics(balance.detach()).mean()))
        self._count_hits(logits.detach(), targets, metrics)
        return loss

    def _fused_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As TRL computes it with its fused head, and the same metrics, which stay on the card until logged."""
        balanced = self.aux_loss_enabled
        given = {**forward_inputs(inputs, balanced=balanced), "labels": inputs["labels"], "fused_lm_head": True}
        outputs, gather = model(**given), self.accelerator.gather_for_metrics
        found = outputs.label_mask.sum()
        loss: torch.Tensor = -outputs.log_probs.sum() / torch.as_tensor(
            found if num_items_in_batch is None else num_items_in_batch
        ).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        metrics = self._metrics["train"]
        if balanced:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
            metrics["aux_loss"].append(gather(outputs.aux_loss.detach()).mean())
        count = gather(found).sum().clamp(min=1)
        metrics["entropy"].append(gather(outputs.entropy.detach().sum()).sum() / count)
        metrics["mean_token_accuracy"].append(gather(outputs.is_top1.sum()).sum() / count)
        return loss

    def _count_hits(self, logits: torch.Tensor, targets: torch.Tensor, metrics: dict[str, list[float]]) -> None:
        entropy, hits = entropy_and_hits(logits, targets)
        sums = torch.stack([entropy, hits.to(entropy.dtype), torch.tensor(float(len(targets)))])
        entropies, right, count = self.accelerator.gather_for_metrics(sums.unsqueeze(0)).sum(0).tolist()
        metrics["entropy"].append(entropies / max(1.0, count))
        metrics["mean_token_accuracy"].append(right / max(1.0, count))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation without the load-balancing loss, so that the held-out loss is that of the tokens alone."""
        balanced, self.aux_loss_enabled = self.aux_loss_enabled, False
        try:
            result: dict[str, float] = super().evaluate(*args, **kwargs)
        finally:
            self.aux_loss_enabled = balanced
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer, with the figures of `score` among the metrics, so that they are logged and callbacks see them."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.score is not None:
            output.metrics.update({f"eval_{name}": value for name, value in broadcast(self.score).items()})
        return output


def train_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
    context: RunContext,
) -> TrainResult:
    """Train the adapter in `model`; goes on from a checkpoint in the context's folder if there is one.

    Args:
        train: rows of `input_ids` and `labels`; packed here by TRL where `arguments["packing"]`.
        validation: rows to look at meanwhile.

    Raises:
        ModelError: packed examples would see each other. DivergedError: the loss stopped being finite.
        ResourceError: the longest batch does not fit, or memory or disk ran out.
        PreemptedError, InterruptedRunError: a signal came; the run is saved.
    """
    console, head, best = context.console, context.head, context.best
    resume = context.resume or Resume(
        {}, newest_checkpoint(context.folder, lambda why: console.print(f"checkpoint skipped: {why}"))
    )
    log = MetricsLog(context.metrics, context.device)
    trainer = _trainer(model, tokenizer, train, validation, context, log)
    keeper = KeepBest(best, model) if best else None
    if keeper:
        trainer.add_callback(keeper)
    places = partial(name_examples, train, context.places)
    guard = StepGuard(context.arguments["max_nonfinite_steps"], places, console.print)
    saved = {**context.parts, **({"mtp": context.head_beside} if context.head_beside else {})}
    trainer.go_on_with(log, resume=resume, parts=saved, guard=guard, stop=context.stop)
    trainer.add_callback(UnmovedAdapters(console))
    if context.train_router and not trainer.aux_loss_enabled:
        console.print("router: no load-balancing loss; transformers computes none for this family, or its weight is 0")
    if trainer.beside:
        trainer.add_callback(trainer.beside)
    if resume.checkpoint:
        console.print(f"resuming from {resume.checkpoint.path.name}")
    isolated = _isolated(model, console) if context.arguments["packing"] else nullcontext()
    with peak_of(context.device) as peak, isolated, trainer.beside or nullcontext():
        output = _run(trainer, resume.checkpoint)
        if head is not None and context.head_stage == "after":
            console.print(f"multi-token-prediction head: {trainer.state.global_step} steps after the adapter")
            learn_after(head, trainer, trainer.state.global_step)
    # TRL leaves router logits switched on, and generation then fails on its growing attention mask.
    model.config.get_text_config().output_router_logits = False
    found = keeper.restore() if keeper else None
    if best and found:
        console.print(f"best: step {found[0]}, {best.metric} {found[1]:.4f}; its adapter is the run's")
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


def _trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
    context: RunContext,
    log: MetricsLog,
) -> AdapterTrainer:
    """TRL's trainer with what the context asks for, before a checkpoint is read into it."""
    arguments, console = context.arguments, context.console
    keep_up_outputs(model, arguments["gradient_checkpointing"])
    balanced = context.train_router and _name_experts_for_trl(model)
    config = sft_config(context, train_router=balanced, evaluates=validation is not None)
    trainer = AdapterTrainer(
        context,
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[log, ProgressDisplay(console, log)] if is_first() else [],
    )
    if processes() > 1:
        sequences = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * processes()
        console.print(f"processes: {processes()}, {sequences} sequences in a step")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _run(trainer: AdapterTrainer, checkpoint: Checkpoint | None) -> Any:
    """Train; memory that runs out becomes one line that says what is kept."""
    try:
        with trainer.stop.until_saved():
            return trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        last = next((path.name for path in every_checkpoint(Path(trainer.args.output_dir))), None)
        then = f"{last} is kept: close other programs, then rerun the same command" if last else "nothing is saved yet"
        raise ResourceError(
            f"step {trainer.state.global_step + 1}: out of memory ({first_line(error)[:120]}); {then}; a smaller "
            "training.max_length, training.per_device_train_batch_size or lora.r needs less"
        ) from error


@contextmanager
def _isolated(model: PeftModel, console: Console) -> Iterator[None]:
    """No packed example sees another within the block, which is proven first."""
    with per_document_attention(model) as alone:
        how = ", each attended to alone" if alone else ""
        how += " (with masks of our own)" if isolate_documents(model) else ""
        console.print(f"packing: no example sees another, checked{how}")
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
    arguments, device, dtype = context.arguments, context.device, context.dtype
    given = {key: value for key, value in arguments.items() if key not in _NOT_TRL}
    coefficient = given.pop("router_aux_loss_coef")
    checkpointing = given.pop("gradient_checkpointing")  # transformers' new name for it is activation_checkpointing
    max_steps, eval_steps = given.pop("max_steps"), given.pop("eval_steps")
    when = "steps" if evaluates and eval_steps else "no"  # at an epoch's end the trainer looks itself, before saving
    config = SFTConfig(
        **given,
        output_dir=str(context.folder),
        max_steps=max_steps or -1,
        eval_strategy=when,
        eval_steps=eval_steps,
        eval_packing=False,
        packing_strategy="bfd",
        # Rows come cut and masked; only packing is left to do.
        dataset_kwargs={"skip_prepare_dataset": not arguments["packing"]},
        router_aux_loss_coef=coefficient if train_router else 0.0,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=device == "cpu",
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        shuffle_dataset=False,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        dataloader_pin_memory=device == "cuda",
        prediction_loss_only=True,
        data_seed=given["seed"],
        # A stack's adapter is one tensor, so none is left out of a step; looking for such would cost one pass a step.
        ddp_find_unused_parameters=False,
    )
    config._n_gpu = min(config.n_gpu, 1)  # else a Trainer that sees two cards copies the model to both by itself
    return config
