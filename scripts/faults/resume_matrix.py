"""Bit-exact resume, over configurations: each run is cut off, resumed, and compared with one that was not.

    python -m scripts.faults.resume_matrix [NAME …]

Compared bit for bit: every logged loss, gradient norm, learning rate, accuracy and held-out loss; the adapter; the
optimizer's state, the random numbers and the sums of the last checkpoint; the mean loss of the result; the
multi-token-prediction head.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoTokenizer, set_seed

from scripts.parity.grpo_families import rollouts
from toolkit.adapters import attach_lora
from toolkit.architecture import describe
from toolkit.checkpoint.config import skeleton
from toolkit.mtp.build import new_head
from toolkit.mtp.training import HeadTraining
from toolkit.offload.attach import load_streamed
from toolkit.offload.place import spread
from toolkit.quant import load_int8
from toolkit.recipe import PREFERENCE_METHODS, TrainingSection
from toolkit.rewards import Asked, Scores
from toolkit.training import Preference, RunContext, TrainResult, train_adapter
from toolkit.training.adapter_steps import AdapterSteps, layer_major_for
from toolkit.training.checkpoint import newest_checkpoint, read_json, read_tensors
from toolkit.training.preference import PreferenceTrainer
from toolkit.training.reference import START
from toolkit.training.reference_free import ReferenceFreeTrainer
from toolkit.training.rollout_steps import RolloutSteps
from toolkit.training.rollouts import Rollouts
from toolkit.training.trainer import AdapterTrainer
from toolkit.training.unpaired import KtoSteps

__all__ = ["CASES", "Case", "Cut", "Outcome", "compare", "train"]

MODEL = Path(__file__).parents[2] / "recipes" / "quickstart" / "nano-qwen3moe-2m"
HEAD = "head.safetensors"
_TIMING = {"memory_bytes", "tokens_per_second", "train_runtime", "eval_runtime"}
_SPEEDS = ("_per_second",)


TRAINERS: dict[str, type[AdapterSteps]] = {
    "sft": AdapterTrainer,
    "dpo": PreferenceTrainer,
    "kto": KtoSteps,
    "orpo": ReferenceFreeTrainer,
    "simpo": ReferenceFreeTrainer,
}
"""The class that trains, by method."""


class Cut(BaseException):
    """Stands for a kill between two forward passes: nothing below catches it."""


@dataclass(frozen=True)
class Case:
    """A configuration: changes to the training section, and the forward passes before which the run is cut off."""

    name: str
    training: dict[str, Any] = field(default_factory=dict)
    cuts: tuple[int, ...] = (4,)
    lora: dict[str, Any] = field(default_factory=dict)
    quant: dict[str, Any] = field(default_factory=dict)
    rows: int = 23
    poisoned: int = -1
    """The forward pass whose loss is not finite."""
    streamed: float = 0.0
    """The share of MoE layers whose experts stay on the disk."""
    by_layer: bool = False
    """Whether a step's micro-batches must go through streamed layers together."""
    head: dict[str, Any] = field(default_factory=dict)
    """A multi-token-prediction head's training, and its `stage`."""
    method: str = "sft"
    """As `training.method`; the rows are read as pairs where it takes them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the method's own section."""
    rollouts: dict[str, Any] | None = None
    """The same where answers are written to prompts; `method`, grpo without it, and `drafted` by a head."""

    @property
    def trainer(self) -> type[AdapterSteps]:
        """The class that trains."""
        return RolloutSteps if self.rollouts is not None else TRAINERS[self.method]


BASE = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "max_length": 96, "warmup_steps": 2, "use_cpu": True}
PLAIN = {"packing": False, "gradient_checkpointing": False}
THREE = {"gradient_accumulation_steps": 3}
ANSWERS = {"per_device_train_batch_size": 4}
TWO = {"per_device_train_batch_size": 2}
MIXED: dict[str, Any] = {"method": "dpo", "options": {"loss_type": ["sigmoid", "sft"]}}
SHORTER: dict[str, Any] = {"method": "dpo", "options": {"ld_alpha": 0.5}}
ALONE: dict[str, Any] = {"method": "kto", "options": {"loss_type": "apo_zero_unpaired"}}
DROPOUT = {"experts": False, "router": False, "lora_dropout": 0.2}

CASES = (
    Case("packed"),
    Case("not packed", PLAIN),
    Case("before the first checkpoint", cuts=(1,)),
    Case("right after a checkpoint", cuts=(2,)),
    Case("two resumes in a row", {**PLAIN, "max_steps": 8}, cuts=(3, 3)),
    Case("three resumes", {**PLAIN, "max_steps": 9, "save_steps": 1}, cuts=(2, 3, 2)),
    Case("accumulation", {**PLAIN, "gradient_accumulation_steps": 2}, cuts=(9,)),
    Case("cut inside an accumulation", {"gradient_accumulation_steps": 3, **PLAIN}, cuts=(10,)),
    Case("accumulation over an epoch's uneven end", {**PLAIN, "gradient_accumulation_steps": 4, "max_steps": 9}, (21,)),
    Case("a checkpoint at an epoch's end", {**PLAIN, "num_train_epochs": 2, "max_steps": None}, cuts=(7,), rows=4),
    Case("an epoch's end with dropout", {**PLAIN, "num_train_epochs": 3, "max_steps": None}, (7,), DROPOUT, rows=4),
    Case("in a later epoch", {**PLAIN, "num_train_epochs": 3, "max_steps": None}, cuts=(9,), rows=5),
    Case("batches of three", {**PLAIN, "per_device_train_batch_size": 3}, cuts=(5,)),
    Case("dropout", {**PLAIN}, (5,), DROPOUT),
    Case("dropout, accumulated", {**PLAIN, "gradient_accumulation_steps": 2}, (9,), DROPOUT),
    Case("workers", {**PLAIN, "dataloader_num_workers": 2}, cuts=(5,)),
    Case("workers, dropout, epochs", {**PLAIN, "dataloader_num_workers": 2, "max_steps": 9}, (7,), DROPOUT, rows=4),
    Case("losses logged in threes", {**PLAIN, "logging_steps": 3}, cuts=(4,)),
    Case("evaluated every third step", {**PLAIN, "eval_steps": 3}, (5,), DROPOUT),
    Case("checkpointing", {"gradient_checkpointing": True}, cuts=(5,)),
    Case("cosine without warm-up", {"lr_scheduler_type": "cosine", "warmup_steps": 0, **PLAIN}, cuts=(3,)),
    Case("linear", {"lr_scheduler_type": "linear", **PLAIN}, cuts=(3,)),
    Case("constant after warm-up", {"lr_scheduler_type": "constant_with_warmup", **PLAIN}, cuts=(3,)),
    Case(
        "noise, LoRA+ and a stable schedule",
        {
            **PLAIN,
            "neftune_noise_alpha": 5.0,
            "loraplus_lr_ratio": 4.0,
            "weight_decay": 0.1,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 2},
        },
        cuts=(3,),
    ),
    Case("fused optimizer", {"optim": "adamw_torch_fused", **PLAIN}, cuts=(3,)),
    Case("weight decay and other betas", {"weight_decay": 0.1, "adam_beta1": 0.8, **PLAIN}, cuts=(5,)),
    Case("experts not int8", PLAIN, (3,), quant={"experts": "none", "linears": "none"}),
    Case("linears by bitsandbytes", PLAIN, (3,), quant={"linears": "bnb"}),
    Case("every linear, ranks apart", PLAIN, (3,), {"target_modules": "all-linear", "rank_pattern": {"experts": 4}}),
    Case("rows of new tokens, dynamic fine-tuning", {"loss_type": "dft"}, (3,), {"new_token_ids": (10, 31)}),
    Case(
        "rows of new tokens, DoRA, smoothed labels",
        {**PLAIN, "label_smoothing_factor": 0.1},
        (3,),
        {"new_token_ids": (10, 31), "use_dora": True, "experts": False, "router": False},
        quant={"linears": "none"},
    ),
    Case("no load-balancing loss", {**PLAIN, "router_aux_loss_coef": 0.0}, cuts=(3,)),
    Case("a step left out before the cut", {**PLAIN, "max_steps": 8}, cuts=(5,), poisoned=2),
    Case("a step left out, logged in threes", {**PLAIN, "logging_steps": 3, "max_steps": 8}, cuts=(5,), poisoned=4),
    Case("experts streamed", PLAIN, (3,), streamed=1.0),
    Case("half of the experts streamed, packed", cuts=(3,), streamed=0.5),
    Case("streamed, two resumes in a row", {**PLAIN, "max_steps": 8}, (3, 3), streamed=1.0),
    Case("streamed, layer by layer", {**PLAIN, **THREE}, (9,), streamed=1.0, by_layer=True),
    Case("streamed, layer by layer, cut inside a step", {**PLAIN, **THREE}, (10,), streamed=1.0, by_layer=True),
    Case(
        "half streamed, layer by layer, epochs",
        {**PLAIN, **THREE, "max_steps": 9},
        (14,),
        streamed=0.5,
        rows=8,
        by_layer=True,
    ),
    Case("streamed, dropout, so no layer by layer", {**PLAIN, **THREE}, (10,), DROPOUT, streamed=1.0),
    Case("a head", PLAIN, (3,), head={"depth": 2}),
    Case("a head, packed and accumulated", {"gradient_accumulation_steps": 2}, (9,), head={"depth": 1}),
    Case("a head, epochs, two resumes", {**PLAIN, "max_steps": 9}, (3, 4), head={"depth": 2}, rows=4),
    Case("a head that learns from the data", PLAIN, (5,), head={"kind": "ce"}),
    Case("a head that pulls at the adapter", PLAIN, (5,), head={"loss_weight": 0.3}),
    Case("a head, dropout", PLAIN, (5,), DROPOUT, head={"depth": 2}),
    Case("a head after the adapter", {**PLAIN, "max_steps": 4}, (3,), head={"stage": "after"}),
    Case("a head after the adapter, cut before it", {**PLAIN, "max_steps": 4}, (4,), head={"stage": "after"}, rows=9),
    Case("a head over streamed experts", {**PLAIN, **THREE}, (10,), head={"depth": 2}, streamed=1.0),
    Case("pairs", {**PLAIN, "per_device_train_batch_size": 2}, (3,), method="dpo"),
    Case("pairs, accumulated, cut inside a step", {**PLAIN, **THREE}, (10,), **MIXED),
    Case("pairs, logged in threes, epochs", {**PLAIN, "logging_steps": 3, "max_steps": 9}, (7,), rows=8, method="dpo"),
    Case("pairs, a step left out before the cut", {**PLAIN, "max_steps": 8}, (5,), poisoned=2, **SHORTER),
    Case("pairs, streamed, layer by layer", {**PLAIN, **THREE}, (10,), streamed=1.0, by_layer=True, method="dpo"),
    Case("answers", {**PLAIN, "per_device_train_batch_size": 3, "max_steps": 8}, (3, 3), method="kto"),
    Case("answers, left out before the cut, accumulated", {**PLAIN, **THREE, **TWO}, (10,), poisoned=1, method="kto"),
    Case("answers, layer by layer", {**PLAIN, **THREE, **TWO}, (10,), streamed=1.0, by_layer=True, method="kto"),
    Case("answers, reference alone, epochs", {**PLAIN, "max_steps": 9}, (7,), rows=8, **ALONE),
    Case("pairs by odds", {**PLAIN, **THREE}, (10,), method="orpo"),
    Case("pairs by means, streamed", {**PLAIN, **THREE}, (10,), streamed=1.0, by_layer=True, method="simpo"),
    Case("written answers", {**PLAIN, **ANSWERS}, (3,), rollouts={}),
    Case(
        "written answers, cut inside an accumulation and its window",
        {**PLAIN, **ANSWERS, "gradient_accumulation_steps": 2, "save_steps": 1, "logging_steps": 3},
        (5, 4),
        rollouts={"steps_per_generation": 4, "num_iterations": 2, "beta": 0.1},
    ),
    Case(
        "written answers, evaluated, epochs", {**PLAIN, **ANSWERS, "max_steps": 9, "eval_steps": 2}, (7,), rollouts={}
    ),
    Case("written answers, a reward that fails before the cut", {**PLAIN, **ANSWERS}, (5,), poisoned=2, rollouts={}),
    Case(
        "written answers, streamed, layer by layer",
        {**PLAIN, **ANSWERS, **THREE},
        (10,),
        streamed=1.0,
        by_layer=True,
        rollouts={},
    ),
    Case("written answers, RLOO", {**PLAIN, **ANSWERS}, (3,), rollouts={"method": "rloo", "num_iterations": 2}),
    Case("written answers, drafted", {**PLAIN, **ANSWERS}, (3,), rollouts={"drafted": True}),
    Case("cut after the last step", {**PLAIN, "max_steps": 4}, cuts=(4,), rows=9),
)


@dataclass(frozen=True)
class Outcome:
    """What must be equal, by name."""

    values: dict[str, Any]

    def differences(self, other: Outcome) -> list[str]:
        """Names of what differs."""
        return [name for name in self.values | other.values if self.values.get(name) != other.values.get(name)]


def train(case: Case, folder: Path, cut: int | None = None, passes: Callable[[], int] = lambda: 0) -> TrainResult:
    """One start of the case's run in `folder`; with `cut`, raises `Cut` before that forward pass of this start."""
    adapted, head = _model(case, folder)
    section = TrainingSection(**{**BASE, **case.training})
    arguments = {**section.model_dump(exclude={"output_dir"}), "report_to": []}
    assert (layer_major_for(adapted, arguments) is not None and head is None) == case.by_layer
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with _interrupted(case, cut):
        result = train_adapter(
            adapted,
            tokenizer,
            _rows(case.rows - case.rows % 2 if case.method in PREFERENCE_METHODS else case.rows),
            _rows(4),
            RunContext(
                folder=folder / "checkpoints",
                metrics=folder / "metrics.jsonl",
                arguments=arguments,
                device="cpu",
                dtype="float32",
                train_router=case.lora.get("router", True),
                console=Console(file=io.StringIO()),
                head=head,
                head_stage=case.head.get("stage", "with"),
                preference=_preference(case, folder),
                rollouts=_rollouts(case, adapted, tokenizer),
            ),
        )
    if head is not None:
        save_file({name: tensor.contiguous() for name, tensor in head.head.state_dict().items()}, folder / HEAD)
    return result


def _model(case: Case, folder: Path) -> tuple[PeftModel, HeadTraining | None]:
    """The adapted model, and its head's training where the case has one."""
    if case.streamed:
        layers = [layer.name for layer in describe(skeleton(str(MODEL))).layers]
        placement = spread(dict.fromkeys(layers, 1), round(case.streamed * len(layers)), "disk")
        model, _ = load_streamed(str(MODEL), placement, cache=folder / "int8", **case.quant)
    else:
        model, _ = load_int8(str(MODEL), **case.quant)
    set_seed(0)
    adapted = attach_lora(model, **{"r": 2, **case.lora})
    if not case.head:
        return adapted, None
    options = {"learning_rate": 3e-3, **{key: value for key, value in case.head.items() if key != "stage"}}
    return adapted, HeadTraining(new_head(model), adapted, **options)


def _preference(case: Case, folder: Path) -> Preference | None:
    if case.method not in PREFERENCE_METHODS:
        return None
    options = PREFERENCE_METHODS[case.method](**case.options).model_dump()
    return Preference(options, folder / "reference.safetensors", {START: ""}, method=case.method)


def _rollouts(case: Case, model: PeftModel, tokenizer: Any) -> Rollouts | None:
    if case.rollouts is None:
        return None
    options = dict(case.rollouts)
    head = new_head(model.get_base_model()).eval() if options.pop("drafted", False) else None
    found = rollouts(model, tokenizer, options.pop("method", "grpo"), options, head)
    if case.poisoned >= 0:
        found.judge.score = _failing(found.judge.score, case.poisoned)  # type: ignore[method-assign]
    return found


def _failing(score: Callable[[Asked], Scores], step: int) -> Callable[[Asked], Scores]:
    """As `score`, but at one step the first reward fails."""

    def scored(asked: Asked) -> Scores:
        found = score(asked)
        fails = asked.trainer_state["global_step"] == step
        return replace(found, failures=("reward even: failed",)) if fails else found

    return scored


def compare(case: Case, folder: Path) -> list[str]:
    """Run the case whole and cut off; gives what differs."""
    whole, parts = folder / "whole", folder / "parts"
    for path in (whole, parts):
        path.mkdir()
    expected = _outcome(whole, train(case, whole))
    for cut in case.cuts:
        try:
            train(case, parts, cut)
        except Cut:
            continue
        return ["the run was not cut off"]
    return expected.differences(_outcome(parts, train(case, parts)))


def _rows(count: int) -> Dataset:
    sequences = [[3 + (start * 7 + step) % 90 for step in range(20 + start % 5)] for start in range(count)]
    return Dataset.from_dict({"input_ids": sequences, "labels": sequences})


@contextmanager
def _interrupted(case: Case, cut: int | None) -> Iterator[None]:
    """Cut the run off before a forward pass (or after the last one), and poison the loss of one."""
    passes = 0
    trainer = case.trainer
    step, loss, finalize = trainer.training_step, trainer._own_loss, trainer._finalize_training

    def training_step(self: AdapterSteps, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal passes
        if passes == cut:
            raise Cut
        passes += 1
        return step(self, *args, **kwargs)

    def own_loss(self: AdapterSteps, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        found = loss(self, *args, **kwargs)
        poisoned = self.model.training and self.state.global_step == case.poisoned
        return found * float("nan") if poisoned and found is not None else found

    def finalize_training(self: AdapterSteps, *args: Any, **kwargs: Any) -> Any:
        if passes == cut:
            raise Cut
        return finalize(self, *args, **kwargs)

    with (
        mock.patch.object(trainer, "training_step", training_step),
        mock.patch.object(trainer, "_own_loss", own_loss),
        mock.patch.object(trainer, "_finalize_training", finalize_training),
    ):
        yield


def _outcome(folder: Path, result: TrainResult) -> Outcome:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in _TIMING and not k.endswith(_SPEEDS)} for line in lines]
    last = newest_checkpoint(folder / "checkpoints")
    assert last is not None
    hashes = {path.name: _sha256(path) for path in last.path.iterdir() if path.suffix == ".safetensors"}
    state = read_json(last.path / "state.json")
    counted = {key: state[key] for key in ("schedule", "random", "loss_logged", "tokens", "trl_tokens", "guard")}
    adapter = {name: tensor.tolist() for name, tensor in read_tensors(last.path / "adapter_model.safetensors").items()}
    facts = {"steps": result.steps, "mean loss": result.loss, "tokens": result.tokens, "skipped": result.skipped}
    optimizer = read_json(last.path / "optimizer.json")
    hashes |= {HEAD: _sha256(folder / HEAD)} if (folder / HEAD).exists() else {}
    return Outcome({**facts, **hashes, **counted, "metrics": kept, "adapter": adapter, "optimizer": optimizer})


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(names: list[str]) -> int:
    """Print a line a case; 1 where a bit differs."""
    failed = 0
    chosen = [case for case in CASES if not names or case.name in names]
    for case in chosen:
        with tempfile.TemporaryDirectory() as folder:
            differs = compare(case, Path(folder))
        failed += bool(differs)
        print(f"{'differs: ' + ', '.join(differs) if differs else 'equal':8}  {case.name}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} configurations resume bit for bit")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
