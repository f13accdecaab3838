"""What is the same in every method of training an adapter: one step's order, its guard, its probe, its tokens.

A method's own trainer of TRL's computes the loss. Around it stand no silent NaN, the longest batch first, all of a
step's micro-batches through a streamed layer before the next, and evaluations that ask for figures of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from toolkit.errors import DivergedError
from toolkit.labels import IGNORED
from toolkit.mtp.training import HeadSteps, HeadTraining
from toolkit.offload.attach import stream_of
from toolkit.ops.document_attention import keep_lengths
from toolkit.ops.token_scores import token_scores
from toolkit.processes import StopRequest, broadcast, processes
from toolkit.training.callbacks import BestAdapter
from toolkit.training.checkpoint import Resume
from toolkit.training.layer_major import LayerMajor
from toolkit.training.memory import longest_rows, probe, within_memory
from toolkit.training.resumable import Resumable, SavedPart
from toolkit.training.rollouts import Rollouts
from toolkit.training.told_labels import told_labels

__all__ = ["TOLD", "AdapterSteps", "Preference", "RunContext", "layer_major_for", "moment_bytes"]


_PROBED = 8
"""Labelled tokens on which TRL's head is compared with the model's own logits."""
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of log-probabilities that rounding may make, over their size: logits are products of some hundred
to some thousand numbers. A head that leaves out a factor is off by that factor."""
_LENGTHS, _TOKENS, TOLD = "document_lengths", "real_tokens", "told_labels"
"""Keys of a batch, between collator and trainer; and names of what they bring, on a tensor of the prepared batch."""


@dataclass(frozen=True)
class Preference:
    """Learning from better and worse answers.

    Args:
        options: the fields of the recipe's section, by TRL's names.
        kept: the file of the reference's log-probabilities. facts: what they depend on beside the pairs.
        forked: the same file of the run that this one is a fork of; its reference is kept.
    """

    options: Mapping[str, Any]
    kept: Path
    facts: Mapping[str, str]
    forked: Path | None = None
    method: str = "dpo"
    """Or kto, orpo, simpo."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Everything that training depends on beside the model and the data.

    Args:
        folder: checkpoints. metrics: the JSON-lines file.
        arguments: fields of the recipe's training section, by TRL's names.
        device: cpu or cuda. dtype: float32, bfloat16 or float16, of the computation.
        train_router: whether the load-balancing loss applies.
        best: what to keep or stop for.
        advice: what to change where memory does not suffice for the longest batch.
        probes: whether that batch goes first. It changes no number; it costs a batch's time.
        micro_batches_per_pass: those that go through a streamed layer before the next; None for all of a step.
        resume: the checkpoint to go on from and what new ones are bound to; without it the newest valid one, unbound.
        stop: told of signals. places: where each training row came from. parts: trained and saved beside the adapter.
        head: a multi-token-prediction head to train in the same steps, or `after` them in as many.
        preference: pairs are trained on, as it says; without it single answers.
        rollouts: answers are written by the model and judged, as it says.
        telemetry: whether TRL may tell the Hub that a run began.
    """

    folder: Path
    metrics: Path
    arguments: Mapping[str, Any]
    device: str
    dtype: str
    console: Console
    train_router: bool = True
    best: BestAdapter | None = None
    advice: str = "a smaller training.max_length"
    probes: bool = True
    micro_batches_per_pass: int | None = None
    resume: Resume | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    places: Sequence[str] = ()
    parts: Mapping[str, SavedPart] = field(default_factory=dict)
    head: HeadTraining | None = None
    head_stage: str = "with"
    preference: Preference | None = None
    rollouts: Rollouts | None = None
    telemetry: bool = False

    @property
    def head_beside(self) -> HeadTraining | None:
        """The head, where it learns in the adapter's steps."""
        return self.head if self.head_stage == "with" else None


class _Counting:
    """TRL's collator; a batch also brings what a card would be asked for: lengths of documents, tokens, labels."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], tells_labels: bool) -> None:
        self.collate, self.tells_labels = collate, tells_labels

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        if "cu_seq_lens_q" in batch:
            batch[_LENGTHS] = batch["cu_seq_lens_q"].diff().tolist()
        if "attention_mask" in batch:
            batch[_TOKENS] = int(batch["attention_mask"].sum())
        if self.tells_labels:
            batch[TOLD] = told_labels(batch["labels"])
        return batch


def _real_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a batch that are no padding."""
    mask = inputs.get("attention_mask")
    told: int | None = getattr(inputs["input_ids"], _TOKENS, None)
    if mask is None:
        return int(inputs["input_ids"].numel())
    return int(mask.sum()) if told is None else told


class AdapterSteps(Resumable):
    """The steps of an adapter; put before a trainer of TRL's, whose loss it is.

    Where a layer streams, all micro-batches of an optimizer step go through it before the next one.
    """

    aux_loss_enabled: bool
    router_aux_loss_coef: float
    data_collator: Callable[[list[Any]], dict[str, Any]]
    wants_trls_balance = False
    """The family's own forward gives no load-balancing loss, so TRL's way is taken from the first batch on."""
    tells_labels = False
    """Whether the host says where a batch's labels are."""
    temperature = 1.0
    """What logits are divided by."""
    trusts_fused_head = True
    """Whether TRL's fused head computes the family's own logits (`check_fused_head`)."""
    gives_balance = True
    """Whether the family's own forward gave a load-balancing loss when it was asked."""
    _logits: torch.Tensor | None = None
    _samples: list[Any]
    _ops_of_a_token: int | None = None
    _losses: Sequence[torch.Tensor] = ()

    def __init__(self, context: RunContext, **trl: Any) -> None:
        """`trl`: what TRL's trainer takes."""
        self.sends_telemetry, self.loraplus_lr_ratio = context.telemetry, context.arguments["loraplus_lr_ratio"]
        self.say = partial(context.console.print, highlight=False, markup=False)
        # Else a Trainer that sees two cards copies the model to both by itself.
        trl["args"]._n_gpu = min(trl["args"].n_gpu, 1)
        super().__init__(**trl)
        self.data_collator = _Counting(self.data_collator, self.tells_labels)
        arguments, head = context.arguments, context.head
        self.score: Callable[[], Mapping[str, float]] | None = context.best.score if context.best else None
        """Figures of the model as it stands that an evaluation has beside the loss."""
        self.advice, self.probes = context.advice, context.probes
        """What to change where memory does not suffice, and whether the longest batch is still to be tried."""
        self.layer_major = None if head else layer_major_for(trl["model"], arguments, context.micro_batches_per_pass)
        self.evaluates_each_epoch = trl["eval_dataset"] is not None and not arguments["eval_steps"]
        beside = context.head_beside
        self.beside = HeadSteps(beside, arguments["learning_rate"]) if beside else None
        """The multi-token-prediction head that learns from the same batches."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The method's loss, checked."""
        self._logits = None
        result = None if return_outputs else self._own_loss(model, inputs, **kwargs)
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

    def _own_loss(self, model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor | None:
        """The same number as TRL's, found otherwise; None where TRL shall find it."""
        return None

    @torch.no_grad()
    def check_fused_head(self) -> bool:
        """Whether TRL's head gives some trained tokens the log-probabilities of the model's own logits.

        Where not, it is not used from now on, and without it there may be no load-balancing loss.
        """
        ids, labels = self._head_probe()
        told = (labels[1:] != IGNORED).nonzero().flatten()[:_PROBED]
        end = int(told[-1]) + 2 if len(told) else 2
        inputs = self._prepare_inputs({"input_ids": ids[None, :end], "attention_mask": torch.ones(1, end).long()})
        labels = labels[None, :end].to(inputs["input_ids"].device)
        self.model.eval()
        with within_memory("a look at one example", self.advice), self.accelerator.autocast():
            own = token_scores(self.model, inputs, labels, balanced=self.aux_loss_enabled, temperature=self.temperature)
            fused = self.model(**inputs, use_cache=False, labels=labels, fused_lm_head=True)
        off = (own.log_probs - fused.log_probs).abs() / own.log_probs.abs().clamp(min=1)
        self.trusts_fused_head = bool(off.max() <= _TOLERANCE[self.model.dtype])
        self.gives_balance = own.aux_loss is not None
        self.aux_loss_enabled &= self.trusts_fused_head or self.gives_balance
        return self.trusts_fused_head

    def _head_probe(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels of one training example, packed or not."""
        row = self.train_dataset[0]
        return torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])

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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """transformers' own, remembered: these micro-batches make one optimizer step."""
        self._samples, count = super().get_batch_samples(*args, **kwargs)
        return self._samples, count

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' own, whose parameters are counted once: it goes through all modules at every step."""
        tokens = inputs["input_ids"].numel() if "input_ids" in inputs else 0
        if not tokens:
            return int(super().floating_point_ops(inputs))
        if self._ops_of_a_token is None:
            self._ops_of_a_token = int(super().floating_point_ops(inputs)) // tokens
        return self._ops_of_a_token * tokens

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch, or of all where this is a step's first; gives its loss.

        Before the first step, those of the longest batch.
        """
        if self.probes:
            self.probes = False
            self._probe(model)
        step = super().training_step
        if self.layer_major is None or len(self._samples) < 2:  # set by `get_batch_samples`
            loss: torch.Tensor = step(model, inputs, *args, **kwargs)
            return loss
        number = next(number for number, sample in enumerate(self._samples) if sample is inputs)
        if number == 0:
            self._before_layer_major(model, self._samples)
            self._losses = self.layer_major.run(
                [partial(step, model, sample, *args, **kwargs) for sample in self._samples]
            )
        return self._losses[number]

    def _before_layer_major(self, model: nn.Module, samples: Sequence[dict[str, Any]]) -> None:
        """What the micro-batches of a step need that takes a pass of its own."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As there; the numbers that came with the batch stay on the host."""
        lengths, tokens, told = (inputs.pop(name, None) for name in (_LENGTHS, _TOKENS, TOLD))
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if lengths is not None:
            keep_lengths(prepared, lengths)
        if tokens is not None:
            setattr(prepared["input_ids"], _TOKENS, tokens)
        if told is not None:
            labels = prepared["labels"]
            setattr(labels, TOLD, told.to(labels.device, non_blocking=True))
        return prepared

    def _probe(self, model: nn.Module) -> None:
        batch = self._prepare_inputs(self._longest_batch())
        metrics, guarded = copy.deepcopy(self._metrics), self.guard.state()
        tokens = self.tokens_trained, self._total_train_tokens
        beside, self.beside = self.beside, None  # it learns from no batch twice

        def step() -> None:
            model.train()
            with self.compute_loss_context_manager():
                labels = batch.get("labels")
                count = None if labels is None else (labels != IGNORED).sum()
                loss = self.compute_loss(model, batch, num_items_in_batch=count)
            self.accelerator.backward(loss)

        def forget() -> None:
            model.zero_grad(set_to_none=True)
            self._metrics, (self.tokens_trained, self._total_train_tokens) = metrics, tokens
            self.guard.restore(guarded)
            self.beside = beside

        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        held = 0 if self.state.global_step else trained * moment_bytes(self.args.optim)
        size = batch["input_ids"].numel()
        probe(step, forget, tokens=size, held=held, device=self.args.device, advice=self.advice)

    def _longest_batch(self) -> dict[str, Any]:
        """The batch that takes the most memory."""
        dataset = self._remove_unused_columns(self.train_dataset, description="probe")
        longest = longest_rows(self.train_dataset, self.args.per_device_train_batch_size)
        return self.data_collator([dataset[index] for index in longest])

    @staticmethod
    def _would_wait(tensor: torch.Tensor) -> bool:
        """Whether asking for a number of it means to wait for all that is queued before."""
        return tensor.device.type != "cpu"

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


def moment_bytes(optim: str) -> int:
    """Bytes of AdamW's two moments per trained parameter, of an optimizer by transformers' name for it."""
    name = optim.value if isinstance(optim, Enum) else optim  # what the trainer's arguments hold prints in capitals
    return 2 if "8bit" in name else 8


def layer_major_for(
    model: nn.Module, arguments: Mapping[str, Any], micro_batches_per_pass: int | None = None
) -> LayerMajor[torch.Tensor] | None:
    """What runs an optimizer step's micro-batches, so many at a time; None where the ordinary order is right.

    That is where nothing is streamed, where there is one micro-batch or more than one process, where activations are
    moved to host memory (by hooks that know one micro-batch), and where dropout or noise is drawn in order.
    """
    stream = stream_of(model)
    is_alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
    pays = stream is not None and arguments["gradient_accumulation_steps"] > 1 and is_alone
    in_order = arguments["activation_offloading"] or arguments["neftune_noise_alpha"] or _draws_random_numbers(model)
    if stream is None or not pays or in_order:
        return None
    return None if micro_batches_per_pass == 1 else LayerMajor(stream, micro_batches_per_pass)


def _draws_random_numbers(model: Any) -> bool:
    """Whether a training forward may draw random numbers: in another order they would be others."""
    layers = (module for module in model.modules() if isinstance(module, nn.Dropout))
    settings = model.config.get_text_config().to_dict().items()
    rates = [value for key, value in settings if "drop" in key or "jitter" in key or "noise" in key]
    return any(layer.p > 0 for layer in layers) or any(isinstance(rate, float) and rate > 0 for rate in rates)
