#!/usr/bin/env python3
"""What a multi-token-prediction head costs in training time: the recipe's steps with a head beside them and without.

    .venv/bin/python scripts/benchmarks/mtp_overhead.py RECIPE [section.key=value …] [--steps 6] [--depth 1]

The arms take turns in one process on one loaded model, each from the same adapter, with glibc told to keep freed
memory. Both the seconds on the clock and those of the processor are given: on a machine that others use, the latter say
more. What the head learns after the training, from the model's own answers, is timed apart, as many times as the steps.
The last line sets it against the whole training of the recipe, as many steps as its tokens fill, each as long as those
that were timed. A head that learns from own answers alone costs the steps nothing: it is not in them.

With lora.adapter_name_or_path=RUN/adapter it is a finished run's adapter, whose answers have their final length.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from options import recipe_parser
from rich.console import Console
from turns import KEEP_FREED_MEMORY, turn

from toolkit import run as job
from toolkit.mtp.training import HeadTraining
from toolkit.plan import make_plan
from toolkit.recipe import load as load_recipe
from toolkit.training import RunContext, train_adapter


class Job:
    """A recipe's model, adapter and data, trained anew each time."""

    def __init__(self, given: argparse.Namespace) -> None:
        changes = [*given.overrides, "mtp.enabled=true", f"mtp.depth={given.depth}"]
        recipe = load_recipe(given.recipe, changes, note=lambda line: print(line))
        self.plan, self.steps = make_plan(recipe), given.steps
        base, self.tokenizer = job.load(self.plan)
        self.batches = job.build_batches(self.tokenizer, self.plan)
        self.model = job.attach(base, self.plan)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def train(self, head: HeadTraining | None = None) -> None:
        """Some steps, from the first adapter."""
        named, recipe = dict(self.model.named_parameters()), self.plan.recipe
        with torch.no_grad():
            for name, value in self.start.items():
                named[name].copy_(value)
        arguments = recipe.training.model_dump(exclude={"output_dir"})
        changes = {"max_steps": self.steps, "save_steps": 10**6, "logging_steps": 10**6, "report_to": []}
        with tempfile.TemporaryDirectory() as folder:
            train_adapter(
                self.model,
                self.tokenizer,
                self.batches.train,
                None,
                RunContext(
                    folder=Path(folder) / "checkpoints",
                    metrics=Path(folder) / "metrics.jsonl",
                    arguments={**arguments, **changes},
                    device=self.plan.device,
                    dtype=self.plan.dtype,
                    train_router=recipe.lora.router,
                    console=Console(quiet=True),
                    head=head,
                    probes=False,
                ),
            )

    def answer(self) -> None:
        """The model's own answers, and what a head learns from them."""
        job.teach_own_answers(self._head(), self.tokenizer, self.batches, self.plan, Console(quiet=True))

    def arms(self) -> dict[str, Callable[[], None]]:
        """What there is to time: with a head only where it is in the steps."""
        mtp = self.plan.recipe.mtp
        headed = {"steps with a head": lambda: self.train(self._head())} if mtp.reads_data else {}
        return {"steps without": self.train, **headed, **({} if mtp.own_answers == 0 else {"own answers": self.answer})}

    def _head(self) -> HeadTraining:
        head = job.make_head(self.model, self.plan)
        assert head is not None
        return head

    def whole(self) -> int:
        """Optimizer steps of the recipe's whole training, if its packed rows are full."""
        training = self.plan.recipe.training
        tokens = sum(map(len, self.batches.train["input_ids"])) * training.num_train_epochs
        full = math.ceil(tokens / (job.step_tokens(self.plan) * training.gradient_accumulation_steps))
        return training.max_steps or full


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    """Alternate, and print."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depth", type=int, default=1)
    given = parser.parse_intermixed_args()
    if any(os.environ.get(key) != value for key, value in KEEP_FREED_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})
    job = Job(given)
    arms = job.arms()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in range(-1, given.repeats):
        for name in turn(list(arms), number):
            seconds = timed(arms[name])
            print(f"round {number + 1}: {name} {seconds[0]:.2f} s, processor {seconds[1]:.2f} s", flush=True)
            if number >= 0:
                found[name].append(seconds)
    steps = job.whole()
    for index, what in enumerate(("clock", "processor")):
        medians = {name: statistics.median(each[index] for each in times) for name, times in found.items()}
        without, own = medians["steps without"], medians.get("own answers", 0.0)
        headed = medians.get("steps with a head", without)
        training = without * steps / given.steps
        print(
            f"{what}: {given.steps} steps {without:.2f} s without, {headed:.2f} s with a head of depth {given.depth}, "
            f"own answers {own:.2f} s; of the recipe's {steps} steps ({training:.0f} s) the head is "
            f"{headed / without - 1 + own / training:+.1%}"
        )


if __name__ == "__main__":
    main()
