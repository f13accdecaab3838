"""The rivals of `train.py`: the same fine-tuning job with onecard, stock TRL + PEFT, and experts4bit-qlora.

    python train_arms.py ours|"ours bf16"|stock|"stock bf16"|experts4bit

A worker of `turns.py`. `ours` goes first: it tokenises the examples and makes the fresh adapter, and writes both to the
job's folder, from which stock TRL trains the very same examples from the very same start. A run is one whole training
from that start; loading is not in its time.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from turns import serve, settled

__all__ = ["ARMS", "Job", "answer", "held_out_loss"]

Rows = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Job:
    """What is trained on what. `batch` examples, or as many as fit in `length` tokens, make an optimizer step."""

    model: str
    train: str
    validation: str
    folder: str
    batch: int
    length: int
    rank: int
    learning_rate: float
    seed: int
    backend: str
    runs: int = 1

    def rows(self, split: str) -> Rows:
        """Token ids and labels of a split, as `ours` wrote them."""
        rows: Rows = json.loads((Path(self.folder) / f"{split}.json").read_text())
        return rows


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Rows, batch: int = 16) -> float:
    """Nats per answer token, over padded batches of examples of like length."""
    model.eval()
    total, count = 0.0, 0
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        ids, labels = (
            nn.utils.rnn.pad_sequence([torch.tensor(row[key]) for row in some], batch_first=True, padding_value=value)
            for key, value in (("input_ids", 0), ("labels", -100))
        )
        lengths = torch.tensor([len(row["input_ids"]) for row in some])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        keep = labels[:, 1:] != -100
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][keep]
        total += float(nn.functional.cross_entropy(logits.float(), labels[:, 1:][keep], reduction="sum"))
        count += int(keep.sum())
    return total / count


class Arm:
    """A loaded model with a fresh adapter, which `run` trains from the start each time."""

    model: nn.Module

    def __init__(self, job: Job) -> None:
        self.job = job
        self._start: dict[str, torch.Tensor] = {}

    def keep_start(self) -> None:
        """Remember the trainable parameters as they are, where there is more than one run to start."""
        if self.job.runs > 1:
            self._start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def back_to_start(self) -> None:
        """Undo whatever a run did to the model."""
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self._start.items():
                named[name].copy_(value)
                named[name].grad = None
        torch.manual_seed(self.job.seed)

    def run(self, variant: str) -> dict[str, float]:
        """Train; seconds, steps and mean training loss."""
        raise NotImplementedError


class Ours(Arm):
    """onecard's verbs. Variants: `packed` (a recipe's defaults), `packed, kept` (activations kept), `padded`."""

    dtype = "float32"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        from toolkit.plan import make_plan
        from toolkit.run import attach, build_batches, load

        self.plan = replace(make_plan(self._recipe()), backend=job.backend)
        base, self.tokenizer = load(self.plan)
        self.batches = build_batches(self.tokenizer, self.plan)
        self.model = attach(base, self.plan)
        self.keep_start()
        if self.dtype == Ours.dtype:
            self._prepare_for_others()

    def _prepare_for_others(self) -> None:
        job = self.job
        assert self.batches.validation is not None
        for split, rows in (("train", self.batches.train), ("validation", self.batches.validation)):
            (Path(job.folder) / f"{split}.json").write_text(json.dumps(list(rows)))
        self.model.save_pretrained(f"{job.folder}/start", save_embedding_layers=False)

    def _recipe(self, **training: Any) -> Any:
        from toolkit.recipe import Recipe

        job = self.job
        fixed = {
            "max_length": job.length, "learning_rate": job.learning_rate, "seed": job.seed, "use_cpu": True,
            "logging_steps": 10**6, "save_steps": 10**6,
        }  # fmt: skip
        return Recipe.model_validate(
            {
                "model": {"model_name_or_path": job.model, "dtype": self.dtype},
                "lora": {"r": job.rank, "lora_alpha": 2.0 * job.rank},
                "data": {"train": job.train, "validation": job.validation},
                "training": {**fixed, **training},
                "eval": {"enabled": False},
            }
        )

    def run(self, variant: str) -> dict[str, float]:
        from toolkit.run import train

        self.back_to_start()
        self.model.gradient_checkpointing_disable()
        padded = {"packing": False, "per_device_train_batch_size": self.job.batch}
        kept = {"gradient_checkpointing": not variant.endswith("kept")}
        recipe = self._recipe(**(padded if variant.startswith("padded") else {}), **kept)
        with tempfile.TemporaryDirectory() as folder:
            plan = replace(self.plan, recipe=recipe, folder=Path(folder))
            done = train(self.model, self.tokenizer, replace(self.batches, validation=None), plan).training
        return {"seconds": done.seconds, "steps": done.steps, "loss": done.loss}

    def packing(self) -> dict[str, float]:
        """The summed loss of all examples, packed and padded, through the trainer's own batches."""
        from rich.console import Console

        from toolkit.training.adapter_steps import RunContext
        from toolkit.training.train import sft_config
        from toolkit.training.trainer import AdapterTrainer

        found = {}
        for name, packing in (("packed", True), ("padded", False)):
            recipe = self._recipe(packing=packing, per_device_train_batch_size=1 if packing else self.job.batch)
            arguments = recipe.training.model_dump(exclude={"output_dir"})
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                place = {"folder": Path(folder), "metrics": Path(folder) / "metrics.jsonl"}
                context = RunContext(
                    **place, arguments=arguments, device="cpu", dtype="float32", console=Console(quiet=True)
                )
                config = sft_config(context, train_router=False, evaluates=False)
                trainer = AdapterTrainer(
                    context,
                    model=self.model,
                    args=config,
                    train_dataset=self.batches.train,
                    eval_dataset=None,
                    processing_class=self.tokenizer,
                )
                self.model.eval()  # no dropout, and nothing that only a training run has
                one = torch.tensor(1)
                losses = [trainer.compute_loss(self.model, batch, num_items_in_batch=one).double()  # type: ignore[union-attr]
                          for batch in trainer.get_train_dataloader()]  # fmt: skip
                found[name] = float(torch.stack(losses).sum())
        return found

    def profile(self, variant: str) -> dict[str, float]:
        """Processor seconds in each operator during a run's steps, its own alone."""
        from torch.profiler import ProfilerActivity, profile

        from toolkit.training.trainer import AdapterTrainer

        train, found = AdapterTrainer.train, {}

        def watched(*args: Any, **kwargs: Any) -> Any:
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                done = train(*args, **kwargs)
            found.update({event.key: event.self_cpu_time_total / 1e6 for event in seen.key_averages()})
            return done

        with patch.object(AdapterTrainer, "train", watched):
            self.run(variant)
        return found


class OursBf16(Ours):
    """The same with weights that are not int8, activations and products in bf16."""

    dtype = "bfloat16"


class Stock(Arm):
    """TRL's SFTTrainer and PEFT's `target_parameters` at their defaults. Variants: `default`, `kept`."""

    dtype = torch.float32

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = AutoModelForCausalLM.from_pretrained(job.model, dtype=self.dtype)
        self.model = PeftModel.from_pretrained(base, f"{job.folder}/start", is_trainable=True)
        self.tokenizer = AutoTokenizer.from_pretrained(job.model)
        self.keep_start()

    def run(self, variant: str) -> dict[str, float]:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        self.back_to_start()
        self.model.gradient_checkpointing_disable()
        job = self.job
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                output_dir=folder, num_train_epochs=1, per_device_train_batch_size=job.batch, max_length=job.length,
                learning_rate=job.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.03, seed=job.seed,
                gradient_checkpointing=variant != "kept", use_cpu=True, bf16=self.dtype == torch.bfloat16,
                report_to="none", disable_tqdm=True, logging_steps=10**6,
            )  # fmt: skip
            trainer = SFTTrainer(
                model=self.model,
                args=config,
                train_dataset=Dataset.from_list(job.rows("train")),
                processing_class=self.tokenizer,
            )
            done = trainer.train()
        self.model.config.output_router_logits = False
        return {
            "seconds": done.metrics["train_runtime"],
            "steps": trainer.state.global_step,
            "loss": done.training_loss,
        }


class StockBf16(Stock):
    """The same with the base in bf16 and products in bf16; PEFT keeps the adapter in fp32."""

    dtype = torch.bfloat16


class Experts4bit(Arm):
    """experts4bit-qlora's loader, adapters and batches on the CPU, in the steps of its trainer (which wants a card).

    As there, gradient checkpointing, AdamW with the router at a tenth of the rate, a cosine schedule and clipping.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        from experts4bit_qlora import add_attention_lora, load_moe_4bit_streaming
        from experts4bit_qlora.lora import router_param_ids, trainable_lora_param_ids

        self.model, _ = load_moe_4bit_streaming(
            job.model, "cpu", torch.float32, job.rank, 2 * job.rank, quant_type="int8"
        )
        add_attention_lora(self.model, job.rank, 2 * job.rank, torch.float32)
        experts, attention = trainable_lora_param_ids(self.model)
        routers = router_param_ids(self.model)
        if not experts or not attention or not routers:
            raise RuntimeError(
                f"adapters on {len(experts)} expert and {len(attention)} attention tensors, {len(routers)} routers"
            )
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in experts | attention | routers)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.groups = [
            [p for p in trained if id(p) not in routers],
            [p for p in trained if id(p) in routers],
        ]
        self.model.float()
        self.model.config.use_cache = False
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.enable_input_require_grads()
        self.keep_start()

    def run(self, variant: str) -> dict[str, float]:
        from transformers import get_cosine_schedule_with_warmup

        self.back_to_start()
        self.model.train()
        started, losses = time.perf_counter(), []
        batches = list(self._batches())
        rates = [self.job.learning_rate, self.job.learning_rate / 10]
        groups = [{"params": each, "lr": rate} for each, rate in zip(self.groups, rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * len(batches)), len(batches))
        for ids, labels, mask in batches:
            optimizer.zero_grad()
            loss = self.model(input_ids=ids, labels=labels, attention_mask=mask).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for each in self.groups for p in each], 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss))
        return {
            "seconds": time.perf_counter() - started,
            "steps": len(batches),
            "loss": sum(losses) / len(losses),
        }

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        from experts4bit_qlora.train import _token_budget_batches

        return _token_budget_batches(self.job.rows("train"), self.job.length, 0, "cpu")


ARMS: dict[str, Callable[[Job], Arm]] = {
    "ours": Ours,
    "ours bf16": OursBf16,
    "stock": Stock,
    "stock bf16": StockBf16,
    "experts4bit": Experts4bit,
}


def answer(arm: str) -> Callable[..., dict[str, Any]]:
    """What a worker of this arm does: `build`, `run`, `packing` or `profile`."""
    built: list[Arm] = []

    def respond(do: str, **given: Any) -> dict[str, Any]:
        if do == "build":
            from transformers.utils import logging

            logging.disable_progress_bar()
            built.append(ARMS[arm](Job(**given["job"])))
            return {"torch": torch.__version__, "loaded": settled()}
        (model,) = built
        if do == "packing":
            return model.packing()  # type: ignore[attr-defined]
        if do == "profile":
            return model.profile(given["variant"])  # type: ignore[attr-defined]
        done = model.run(given["variant"])
        if given.get("held_out"):
            done["held_out"] = held_out_loss(model.model, model.job.rows("validation"))
        return done

    return respond


if __name__ == "__main__":
    serve(answer(sys.argv[1]))
