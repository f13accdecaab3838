"""A trainer on our checkpoints: everything that the next step depends on is saved, and a resume changes no bit.

transformers saves adapter, optimizer, schedule and random numbers, but not the losses that were summed up and not yet
logged; it evaluates at an epoch's end after it saved, so that a resume skips it; and it trains one step too many where
the last step is saved already. Its own seams (`_save_checkpoint`, `_load_*`, callbacks) are enough to mend that, and
they are no method's: the class stands before any trainer of TRL's, as in `class Ours(Resumable, DPOTrainer)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from toolkit.errors import DivergedError, ModelError
from toolkit.processes import StopRequest, is_first
from toolkit.training.callbacks import MetricsLog
from toolkit.training.checkpoint import (
    Resume,
    flatten,
    random_state,
    read_json,
    read_tensors,
    restore_random_state,
    rotate,
    unflatten,
    write_checkpoint,
)
from toolkit.training.divergence import StepGuard
from toolkit.training.optimizer import with_one_wait

__all__ = ["Resumable", "SavedPart"]

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER, STATE, TRAINER_STATE = "optimizer", "state", "trainer_state.json"

_INTERVALS = ("logging_steps", "eval_steps", "save_steps")


class SavedPart(Protocol):
    """Something beside the adapter that is trained and saved with it, such as a `torch.nn.Module`."""

    def state_dict(self) -> dict[str, Any]:
        """Its state: tensors, numbers, text, nested as it likes."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take over what `state_dict` gave."""


class Resumable(Trainer):  # type: ignore[misc]
    """Saves and restores a run whole; put before a trainer of TRL's. `go_on_with` must be called before `train`."""

    _metrics: dict[str, dict[str, list[Any]]]
    _total_train_tokens: float
    optimizer: Any
    evaluates_each_epoch = False
    tokens_trained = 0
    """Real tokens that went through training, padding not counted; over resumes too."""
    loraplus_lr_ratio: float | None = None
    """How many times the learning rate the Bs learn with."""
    sends_telemetry = False
    """Whether TRL may tell the Hub that a run began."""

    def _send_telemetry(self) -> None:
        """As TRL, where that is asked for."""
        if self.sends_telemetry:
            super()._send_telemetry()

    def go_on_with(
        self,
        metrics: MetricsLog,
        *,
        resume: Resume,
        parts: Mapping[str, SavedPart],
        guard: StepGuard,
        stop: StopRequest,
    ) -> None:
        """Say what else belongs to this run.

        Args:
            metrics: the log whose position is saved. resume: what checkpoints are bound to.
            parts: what is saved beside the adapter, by name. guard: watches losses and gradients.

        Raises:
            ModelError: something is trained that no checkpoint would hold.
        """
        self.metrics_log, self.parts, self.guard, self.stop = metrics, parts, guard, stop
        self.facts = resume.facts
        self.trusted = {resume.checkpoint.path.name} if resume.checkpoint else set()
        self._restored: dict[str, Any] | None = None
        self.add_callback(_Boundary(self))
        modules = [part for part in parts.values() if isinstance(part, nn.Module)]
        kept = {id(parameter) for module in modules for parameter in module.parameters()}
        saved = {tensor.data_ptr() for tensor in self._adapter().values()}  # PEFT saves some under other names
        for name, parameter in self.model.named_parameters():
            known = parameter.data_ptr() in saved or id(parameter) in kept
            if parameter.requires_grad and not known:
                raise ModelError(f"{name}: is trained, but no checkpoint would hold it; register it as a part")

    @staticmethod
    def get_optimizer_cls_and_kwargs(*given: Any, **named: Any) -> tuple[Any, Any]:
        """transformers' choice, without bitsandbytes' waits."""
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(*given, **named)
        return with_one_wait(optimizer), options

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """transformers', or PEFT's LoRA+ over the same one."""
        made: torch.optim.Optimizer
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            made = super().create_optimizer(model)
            return made
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        given = {**options, "lr": self.args.learning_rate, "loraplus_weight_decay": self.args.weight_decay}
        self.optimizer = made = create_loraplus_optimizer(
            self.model, kind, loraplus_lr_ratio=self.loraplus_lr_ratio, **given
        )
        return made

    def take_average(self) -> None:
        """Give the model what a schedule-free optimizer has learnt: gradients are taken at another point."""
        if callable(leave := getattr(self.optimizer, "eval", None)):
            leave()

    def _adapter(self) -> dict[str, torch.Tensor]:
        return dict(get_peft_model_state_dict(self.model, save_embedding_layers=False))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        if not is_first():  # every process has the same adapter and optimizer state
            return
        self.metrics_log.settle()
        adapter = {key: value.detach().cpu().contiguous() for key, value in self._adapter().items()}
        _refuse_broken(adapter, self.state.global_step)
        tensors: dict[str, dict[str, torch.Tensor]] = {ADAPTER: adapter}
        # transformers stores shares of the steps as steps, and warns that they differ when the run resumes.
        state = {**asdict(self.state), **{name: getattr(self.args, name) for name in _INTERVALS}}
        texts = {CONFIG: _adapter_config(self.model), TRAINER_STATE: json.dumps(state, sort_keys=True)}
        for name, value in self._state().items():
            found: dict[str, torch.Tensor] = {}
            tensors[f"{name}.safetensors"] = found
            texts[f"{name}.json"] = json.dumps(flatten(value, found, name))
        facts = {**self.facts, "eval_loss": self._held_out_loss(), "max_steps": self.state.max_steps}
        folder = Path(self.args.output_dir)
        saved = write_checkpoint(folder, self.state.global_step, tensors=tensors, texts=texts, facts=facts)
        self.trusted.add(saved.path.name)
        rotate(folder, self.args.save_total_limit, self.trusted)

    def _state(self) -> dict[str, Any]:
        """By file: what the next step depends on, beside the adapter."""
        self._read_figures()
        scaler = self.accelerator.scaler
        state = {
            "random": random_state(),
            "schedule": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "loss": self._tr_loss,
            "loss_logged": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": dict(self._metrics["train"]),
            "tokens": self.tokens_trained,
            "trl_tokens": self._total_train_tokens,
            "guard": self.guard.state(),
            "metrics_bytes": self.metrics_log.position(),
            "epoch": self.state.epoch,
            "batch": self.state.global_step * self.args.gradient_accumulation_steps,
        }
        parts = {f"part-{name}": part.state_dict() for name, part in self.parts.items()}
        return {OPTIMIZER: self.optimizer.state_dict(), STATE: state, **parts}

    def _held_out_loss(self) -> float | None:
        """The held-out loss at this very step, where it was looked at."""
        last = next((line for line in reversed(self.state.log_history) if "eval_loss" in line), None)
        return last["eval_loss"] if last and last["step"] == self.state.global_step else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        _take_over(self._adapter(), read_tensors(folder / ADAPTER), folder)
        for name, part in self.parts.items():
            if not (folder / f"part-{name}.json").is_file():
                raise ModelError(f"{folder}: holds no {name}; --fork starts a new run from its weights")
            part.load_state_dict(_read_tree(folder, f"part-{name}"))
        self._restored = _read_tree(folder, STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = _read_tree(Path(checkpoint), OPTIMIZER)
            try:
                self.optimizer.load_state_dict(state)
            except (ValueError, KeyError) as error:
                raise ModelError(f"{checkpoint}: of another optimizer: {error}") from None
            _lay_anew(self.lr_scheduler, self._of_checkpoint("schedule"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None and self._of_checkpoint("scaler"):
            self.accelerator.scaler.load_state_dict(self._of_checkpoint("scaler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random_state(self._of_checkpoint("random"))

    def _of_checkpoint(self, key: str) -> Any:
        assert self._restored is not None
        return self._restored[key]

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        result: tuple[int, int] = super()._init_training_state(max_steps, *args)
        if self.state.global_step > max_steps:
            raise ModelError(
                f"{self.args.output_dir}: has {self.state.global_step} steps already, the recipe asks for {max_steps}; "
                "raise training.max_steps, or add --fork"
            )
        # The checkpoint's intervals are those of the recipe that wrote it; this one's count.
        self.state.compute_steps(self.args, max_steps)
        return result

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:  # saved at the last step, then killed: nothing is left to train
            self.control.should_training_stop = True

    def restore_counters(self) -> None:
        """Sums that Trainer starts at zero, and the length of the metrics log, as they were at the checkpoint."""
        if self._restored is None:
            self.metrics_log.go_on(0, 0)  # of a run that was killed before its first checkpoint
            return
        found = self._restored
        self._tr_loss = found["loss"].to(self.args.device)
        self._total_loss_scalar = found["loss_logged"]
        self._globalstep_last_logged = found["last_logged"]
        self._initial_global_step = 0  # the mean loss is that of the whole run
        self._metrics["train"].update(found["metrics"])
        self.model.train()  # else, where no step is left, the run's last line lacks them
        self.tokens_trained = found["tokens"]
        self._total_train_tokens = found.get("trl_tokens", found["tokens"])  # older checkpoints have one count
        self.guard.restore(found["guard"])
        self.metrics_log.go_on(found["metrics_bytes"], found["tokens"])

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As Trainer; gradients that are not finite are gone before the optimizer sees them."""
        norm = super()._clip_grad_norm(model)
        scaler = self.accelerator.scaler
        scaled = scaler is not None and scaler.get_scale() > 1
        if not self.guard.settle(self.state.global_step + 1, torch.as_tensor(norm), scaled=scaled):
            model.zero_grad()
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL, with means over the steps that counted."""
        self._read_figures()
        if "loss" in logs:
            self.guard.correct(logs)
        super().log(logs, start_time)

    def _read_figures(self) -> None:
        """Make numbers of the figures that still lie on a card, in one wait."""
        lists = [values for metrics in self._metrics.values() for values in metrics.values()]
        unread = [value.float().reshape(()) for values in lists for value in values if isinstance(value, torch.Tensor)]
        numbers = iter(torch.stack(unread).tolist() if unread else ())
        for values in lists:
            values[:] = [next(numbers) if isinstance(value, torch.Tensor) else value for value in values]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL, but without drawing from the training's random numbers: how often one looks changes no result."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            result: dict[str, float] = super().evaluate(*args, **kwargs)
        return result


class _Boundary(TrainerCallback):  # type: ignore[misc]
    """What happens between two steps: evaluate, then save, then stop where a signal asked for it."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on counting where the checkpoint stopped."""
        self.trainer.restore_counters()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate at an epoch's last step rather than after it, so that a checkpoint of that step holds the result."""
        ends = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        control.should_evaluate |= self.trainer.evaluates_each_epoch and ends
        control.should_save |= self.trainer.stop.requested_anywhere()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A signal that came meanwhile is for this step."""
        control.should_save |= self.trainer.stop.requested_anywhere()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave, saved."""
        self.trainer.stop.leave(f"saved at step {state.global_step}")


def _lay_anew(schedule: LambdaLR, saved: Mapping[str, Any]) -> None:
    """Go on with a schedule from where it was saved; the next step's rate is this run's own, whose end may have moved.

    The rates in an optimizer's state are those of the schedule that was saved: 0 where that one had ended.
    """
    rates = [
        peak * share(saved["last_epoch"]) for peak, share in zip(saved["base_lrs"], schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.load_state_dict({**saved, "_last_lr": rates})


def _read_tree(folder: Path, name: str) -> Any:
    return unflatten(read_json(folder / f"{name}.json"), read_tensors(folder / f"{name}.safetensors"))


def _adapter_config(model: PeftModel) -> str:
    """PEFT's configuration, so that stock PEFT opens a checkpoint; sets in a fixed order."""
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in _own_config(model).items()}
    return json.dumps(config, indent=2, sort_keys=True, default=str)


def _own_config(model: PeftModel) -> dict[str, Any]:
    found: dict[str, Any] = model.peft_config["default"].to_dict()
    return {**found, "inference_mode": True}


def _refuse_broken(adapter: Mapping[str, torch.Tensor], step: int) -> None:
    for name, tensor in adapter.items():
        if not torch.isfinite(tensor).all():
            raise DivergedError(
                f"step {step}: {name} is no longer finite, so it is not saved; the last checkpoint is untouched: "
                "lower training.learning_rate and start again with --fork"
            )


def _take_over(own: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Copy the tensors of a checkpoint into a model's own of the same names, shapes and dtypes."""
    kinds = [{name: (tuple(t.shape), t.dtype) for name, t in part.items()} for part in (own, found)]
    if kinds[0] != kinds[1]:
        name = min(name for name in own.keys() | found.keys() if kinds[0].get(name) != kinds[1].get(name))
        raise ModelError(f"{folder}: {name}: {kinds[1].get(name)}, the model has {kinds[0].get(name)}")
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
