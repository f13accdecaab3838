"""The sides of `preferences_speed.py`: the same pairs and prompts with onecard, and with stock TRL + PEFT.

    python preference_arms.py "ours fp32"|"ours bf16"|"stock fp32"|"stock bf16"

A worker of `turns.py`. Ours goes first: it tokenises the pairs and makes the fresh adapter, and writes both to the
job's folder. A run is one whole training from that start; loading is not in its time.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from generate import DTYPES, EXPERTS, MOST_COPIED, with_experts
from torch.nn import functional
from turns import serve

__all__ = ["WORKERS", "Job", "answer", "held_out_loss"]

WORKERS = ("ours fp32", "ours bf16", "stock fp32", "stock bf16")
BETA = 0.1


@dataclass(frozen=True)
class Job:
    """What is trained on. In `folder` are the pairs, and what ours makes: tokens, and the adapter to start from."""

    model: str
    folder: str
    batch: int
    length: int
    rank: int
    learning_rate: float
    dtype: str

    def pairs(self, split: str) -> list[Any]:
        """Rows as TRL reads them."""
        lines = (Path(self.folder) / f"pairs.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def tokens(self, split: str) -> list[dict[str, list[int]]]:
        """Rows 2n and 2n + 1 are a pair's answers, tokenised."""
        rows: list[dict[str, list[int]]] = json.loads((Path(self.folder) / f"{split}.json").read_text())
        return rows


class Ours:
    """onecard's verbs."""

    def __init__(self, job: Job) -> None:
        from toolkit.plan import make_plan
        from toolkit.run import attach, build_batches, load

        self.job = job
        self.plan = make_plan(self.recipe())
        base, self.tokenizer = load(self.plan)
        self.batches = build_batches(self.tokenizer, self.plan)
        self.model = attach(base, self.plan)
        start = Path(job.folder) / "start"
        if not start.is_dir():
            for split, rows in (("train", self.batches.train), ("validation", self.batches.validation)):
                given = [{key: row[key] for key in ("input_ids", "labels")} for row in rows or ()]
                (Path(job.folder) / f"{split}.json").write_text(json.dumps(given))
            self.model.save_pretrained(str(start), save_embedding_layers=False)

    def recipe(self, **training: Any) -> Any:
        """Of the job."""
        from toolkit.recipe import Recipe

        job, folder = self.job, self.job.folder
        fixed = {
            "method": "dpo", "max_length": job.length, "learning_rate": job.learning_rate, "use_cpu": True,
            "per_device_train_batch_size": job.batch, "logging_steps": 10**6, "save_steps": 10**6, "packing": False,
        }  # fmt: skip
        return Recipe.model_validate(
            {
                "model": {"model_name_or_path": job.model, "dtype": {"fp32": "float32", "bf16": "bfloat16"}[job.dtype]},
                "lora": {"r": job.rank, "lora_alpha": 2.0 * job.rank},
                "data": {f: f"{folder}/pairs.{f}.jsonl" for f in ("train", "validation")},
                "training": {**fixed, **training},
                "dpo": {"beta": BETA},
                "eval": {"enabled": False},
            }
        )

    def train(self, *, kept: bool) -> float:
        """Seconds of one epoch of DPO."""
        from toolkit.run import train

        self.model.gradient_checkpointing_disable()
        with tempfile.TemporaryDirectory() as folder:
            plan = replace(self.plan, recipe=self.recipe(gradient_checkpointing=not kept), folder=Path(folder))
            done = train(self.model, self.tokenizer, replace(self.batches, validation=None), plan).training
        return float(done.seconds)

    @cached_property
    def writers(self) -> dict[int, Any]:
        """By the most tokens of an answer."""
        return {}

    def write(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Sampled answers."""
        if new not in self.writers:
            self.writers[new] = _writer(self.model, self.tokenizer, new, None, 1)
        found: list[list[int]] = self.writers[new](prompts)
        return found


class Stock:
    """TRL's DPOTrainer and PEFT's `target_parameters` as they come."""

    def __init__(self, job: Job) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.job = job
        base = AutoModelForCausalLM.from_pretrained(job.model, dtype=DTYPES[job.dtype])
        self.model = PeftModel.from_pretrained(base, f"{job.folder}/start", is_trainable=True)
        self.tokenizer = AutoTokenizer.from_pretrained(job.model)
        self.fastest: dict[int, str] = {}

    def train(self, *, kept: bool) -> float:
        """Seconds of one epoch of DPO."""
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        job = self.job
        with_experts(self.model, EXPERTS[0]).gradient_checkpointing_disable()
        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(
                output_dir=folder, num_train_epochs=1, per_device_train_batch_size=job.batch, max_length=job.length,
                learning_rate=job.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.03, beta=BETA,
                gradient_checkpointing=not kept, use_cpu=True, bf16=job.dtype == "bf16", report_to="none",
                disable_tqdm=True, logging_steps=10**6, save_strategy="no",
            )  # fmt: skip
            done = DPOTrainer(
                model=self.model,
                args=config,
                train_dataset=Dataset.from_list(job.pairs("train")),
                processing_class=self.tokenizer,
            ).train()
        self.model.config.output_router_logits = False
        if "ref" in self.model.peft_config:  # TRL's copy of the start
            self.model.delete_adapter("ref")
        return float(done.metrics["train_runtime"])

    def write(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Sampled answers by `generate`."""
        if new not in self.fastest:
            tried = EXPERTS if sum(map(len, prompts)) <= MOST_COPIED else EXPERTS[:1]
            self.fastest[new] = min(tried, key=lambda name: self._written(name, prompts, new)[0])
        return self._written(self.fastest[new], prompts, new)[1]

    @torch.no_grad()
    def _written(self, experts: str, prompts: Sequence[Sequence[int]], new: int) -> tuple[float, list[list[int]]]:
        width, end = max(map(len, prompts)), self.model.generation_config.eos_token_id
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        started = time.perf_counter()
        model = with_experts(self.model, experts)
        texts = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, **sampled)[:, width:].tolist()
        seconds, ends = time.perf_counter() - started, end if isinstance(end, list) else [end]
        stops = [next((n for n, token in enumerate(text) if token in ends), new - 1) for text in texts]
        return seconds, [text[: stop + 1] for text, stop in zip(texts, stops, strict=True)]


def _writer(model: Any, tokenizer: Any, new: int, head: Any, depth: int) -> Any:
    from toolkit.evaluate.generate import AnswerWriter
    from toolkit.recipe import GrpoSection

    options = GrpoSection(max_completion_length=new).model_dump()
    return AnswerWriter(model, tokenizer, options, head=head, count=depth, note=sys.stderr.write)


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[Mapping[str, list[int]]]) -> float:
    """DPO's loss over pairs, the adapter off as reference, by plain logits; nats."""
    model.eval()
    margins = torch.zeros(len(rows) // 2)
    for sign, context in ((1.0, None), (-1.0, model.disable_adapter)):
        with context() if context else ExitStack():
            for number, row in enumerate(rows):
                ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()[labels != -100]
                logp = -functional.cross_entropy(logits, labels[labels != -100], reduction="sum")
                margins[number // 2] += sign * (1.0 if number % 2 == 0 else -1.0) * logp
    return float(-functional.logsigmoid(BETA * margins).mean())


def answer(worker: str) -> Callable[..., dict[str, Any]]:
    """What a worker does: `build`, `dpo` or `rollouts`; and of a finished run `open` and `drafts`."""
    who, dtype = worker.split()
    held: dict[str, Any] = {}

    def respond(do: str, **given: Any) -> dict[str, Any]:
        if do == "build":
            from transformers.utils import logging

            logging.disable_progress_bar()
            side: Any = (Ours if who == "ours" else Stock)(Job(**given["job"], dtype=dtype))
            named = {name: p for name, p in side.model.named_parameters() if p.requires_grad}
            held.update(side=side, named=named, start={name: p.detach().clone() for name, p in named.items()})
            return {}
        if do == "open":
            held.update(_opened(given["run"], given["new"], given["depth"]))
            return {}
        if do == "drafts":
            return _timed(held[given["how"]], given["prompts"])
        side = held["side"]
        with torch.no_grad():
            for name, value in held["start"].items():
                held["named"][name].copy_(value)
        torch.manual_seed(0)
        if do == "rollouts":
            side.model.eval()
            return _timed(lambda prompts: side.write(prompts, given["new"]), given["prompts"])
        seconds = side.train(kept=given["kept"])
        loss = held_out_loss(side.model, side.job.tokens("validation")) if given.get("held_out") else None
        return {"seconds": seconds, "held_out": loss}

    return respond


def _timed(write: Callable[[Any], list[list[int]]], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    started = time.perf_counter()
    written = write(prompts)
    seconds = time.perf_counter() - started
    owner = getattr(write, "figures", dict)
    return {"seconds_per_token": seconds / sum(map(len, written)), **owner()}


def _opened(run: str, new: int, depth: int) -> dict[str, Any]:
    """Writers of a finished run's answers, and its held-out prompts."""
    from toolkit import load_recipe, make_plan
    from toolkit.run.model import reopen
    from toolkit.run.mtp import reopen_head

    plan = make_plan(load_recipe(Path(run) / "recipe.yaml"), for_training=False)
    model, tokenizer = reopen(plan, Path(run) / "adapter")
    model.eval()
    head = reopen_head(model, plan, Path(run) / "adapter")
    return {
        "with": _writer(model, tokenizer, new, head, depth),
        "without": _writer(model, tokenizer, new, None, depth),
    }


if __name__ == "__main__":
    serve(answer(sys.argv[1]))
