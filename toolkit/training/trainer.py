"""TRL's `SFTTrainer` with the promises of this project: no silent NaN, no leaking checkpoint, metrics as lines.

Packing, chunked loss, token-normalised accumulation, load-balancing loss, schedules and trackers are TRL's and
transformers' own. TRL packs with position ids that restart at each example, from which transformers builds a
block-diagonal mask for every attention backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from toolkit.architecture import describe
from toolkit.errors import DivergedError
from toolkit.mtp import HeadTraining
from toolkit.ops import keep_up_outputs
from toolkit.training.beside import HeadSteps, learn_after
from toolkit.training.documents import documents_apart
from toolkit.training.labelled import can_keep_logits, labelled_logits
from toolkit.training.packing import isolate_documents
from toolkit.training.progress import MetricsLog, ProgressDisplay, peak_memory

__all__ = ["AdapterTrainer", "TrainResult", "sft_config", "train_adapter"]


_MOST_LOGITS = 1 << 28
"""Bytes of logits that may exist at once on a CPU before they are computed in chunks."""


@dataclass(frozen=True)
class TrainResult:
    """How training went: steps, mean loss, seconds, real tokens, peak memory in bytes."""

    steps: int
    loss: float
    seconds: float
    tokens: int
    peak_memory: int
    resumed_from: int


class AdapterTrainer(SFTTrainer):  # type: ignore[misc]
    """Stops at the first non-finite loss, and writes checkpoints without TRL's model card (it names local paths)."""

    aux_loss_enabled: bool
    wants_trls_balance = False
    """The family's own forward gives no load-balancing loss, so TRL's way is taken from the first batch on."""
    tokens_trained = 0
    """Real tokens that went through training here, padding not counted."""
    _logits: torch.Tensor | None = None
    beside: HeadSteps | None = None
    """The multi-token-prediction head that learns from the same batches."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """TRL's loss, checked; on a CPU, where TRL computes the logits of all tokens, that of the labelled ones."""
        result: torch.Tensor | tuple[torch.Tensor, Any] | None = None
        self._logits = None
        if not return_outputs and self._pays_to_keep_logits(inputs["labels"]):
            result = self._labelled_loss(model, inputs, **kwargs)
        if result is None:
            result = super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if self.model.training:
            mask = inputs.get("attention_mask")
            self.tokens_trained += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self.tokens_trained]
        if not torch.isfinite(loss.detach()):
            raise DivergedError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}; lower training.learning_rate "
                "or look at the examples of this step; the last checkpoint is untouched"
            )
        if self.beside is not None and self.model.training:
            result = self.beside.learn(result, inputs, self._logits, kwargs.get("num_items_in_batch"))
        return result

    def _pays_to_keep_logits(self, labels: torch.Tensor) -> bool:
        """TRL's way needs less memory where many positions are labelled, and is as fast on a card."""
        if labels.device.type != "cpu" or self.wants_trls_balance or not can_keep_logits(self.model):
            return False
        positions = int((labels[:, 1:] != -100).any(0).sum())
        size = labels.shape[0] * positions * self.model.get_output_embeddings().weight.shape[0]
        return bool(size * self.model.dtype.itemsize <= _MOST_LOGITS)

    def _labelled_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor | None:
        """As TRL computes it, and the same metrics; None where the family gives no load-balancing loss of its own."""
        given = {**inputs, "use_cache": False, **({"output_router_logits": True} if self.aux_loss_enabled else {})}
        labels = given.pop("labels")
        logits, targets, outputs = labelled_logits(model, given, labels)
        self._logits = logits.detach()
        balance = getattr(outputs, "aux_loss", None)
        if self.aux_loss_enabled and balance is None:
            self.wants_trls_balance = True
            return None
        metrics = self._metrics["train" if self.model.training else "eval"]
        count = torch.as_tensor(len(targets) if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        loss: torch.Tensor = cross_entropy(logits.float(), targets, reduction="sum") / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if balance is not None and self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * balance / steps
            metrics["aux_loss"].append(float(self.accelerator.gather_for_metrics(balance.detach()).mean()))
        self._count_hits(logits.detach(), targets, metrics)
        return loss

    def _count_hits(self, logits: torch.Tensor, targets: torch.Tensor, metrics: dict[str, list[float]]) -> None:
        log_probabilities = logits.float().log_softmax(-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum()
        hits = (log_probabilities.argmax(-1) == targets).sum()
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)
        if self.beside is not None:
            self.beside.save(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")


def train_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
    *,
    folder: Path,
    metrics: Path,
    arguments: dict[str, Any],
    device: str,
    dtype: str,
    train_router: bool,
    console: Console,
    head: HeadTraining | None = None,
    head_stage: str = "with",
) -> TrainResult:
    """Train the adapter in `model`; goes on from the newest checkpoint in `folder` if there is one.

    Args:
        train: rows of `input_ids` and `labels`; packed here by TRL where `arguments["packing"]`.
        folder: checkpoints. metrics: the JSON-lines file.
        arguments: fields of the recipe's training section, by TRL's names.
        dtype: float32, bfloat16 or float16, of the computation.
        train_router: whether the load-balancing loss applies.
        head: a multi-token-prediction head to train in the same steps, or `after` them in as many.

    Raises:
        ModelError: packed examples would see each other. DivergedError: the loss stopped being finite.
    """
    keep_up_outputs(model, arguments["gradient_checkpointing"])
    log = MetricsLog(metrics, device)
    balanced = train_router and _name_experts_for_trl(model)
    config = sft_config(folder, arguments, device, dtype, train_router=balanced, evaluates=validation is not None)
    trainer = AdapterTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[log, ProgressDisplay(console, log)],
    )
    trainer.remove_callback(PrinterCallback)
    if train_router and not trainer.aux_loss_enabled:
        console.print("router: no load-balancing loss; transformers computes none for this family, or its weight is 0")
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if checkpoint:
        console.print(f"resuming from {Path(checkpoint).name}")
    if head is not None and head_stage == "with":
        trainer.beside = HeadSteps(head, arguments["learning_rate"])
        trainer.add_callback(trainer.beside)
        if checkpoint:
            trainer.beside.load(Path(checkpoint))
    with _apart(model, console) if arguments["packing"] else nullcontext(), trainer.beside or nullcontext():
        output = trainer.train(resume_from_checkpoint=checkpoint)
        if head is not None and head_stage == "after":
            console.print(f"multi-token-prediction head: {trainer.state.global_step} steps after the adapter")
            learn_after(head, trainer, trainer.state.global_step)
    # TRL leaves router logits switched on, and generation then fails on its growing attention mask.
    model.config.get_text_config().output_router_logits = False
    return TrainResult(
        steps=trainer.state.global_step,
        loss=output.training_loss if math.isfinite(output.training_loss) else float("nan"),
        seconds=float(output.metrics["train_runtime"]),
        tokens=trainer.tokens_trained,
        peak_memory=peak_memory(device),
        resumed_from=int(checkpoint.rpartition("-")[2]) if checkpoint else 0,
    )


@contextmanager
def _apart(model: PeftModel, console: Console) -> Iterator[None]:
    """No packed example sees another within the block, which is proven first."""
    with documents_apart(model) as alone:
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


def sft_config(
    folder: Path, arguments: dict[str, Any], device: str, dtype: str, *, train_router: bool, evaluates: bool
) -> SFTConfig:
    """TRL's configuration from the recipe's training fields; `train_router` switches the load-balancing loss on."""
    given = {key: value for key, value in arguments.items() if key != "use_cpu"}
    coefficient = given.pop("router_aux_loss_coef")
    checkpointing = given.pop("gradient_checkpointing")  # transformers' new name for it is activation_checkpointing
    max_steps, eval_steps = given.pop("max_steps"), given.pop("eval_steps")
    when = "no" if not evaluates else "steps" if eval_steps else "epoch"
    return SFTConfig(
        **given,
        output_dir=str(folder),
        max_steps=max_steps or -1,
        eval_strategy=when,
        eval_steps=eval_steps,
        eval_packing=False,
        packing_strategy="bfd",
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
    )
