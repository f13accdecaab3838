#!/usr/bin/env python3
"""What a multi-token-prediction head costs in training time: the recipe's steps with a head beside them and without.

    .venv/bin/python scripts/benchmarks/mtp_overhead.py RECIPE [section.key=value …] [--steps 6] [--depth 1]

The arms take turns in one process on one loaded model, each from the same adapter, with glibc told to keep freed
memory. Both the seconds on the clock and those of the processor are given: on a machine that others use, the latter say
more. What the head learns after the training, from the model's own answers, is timed apart: it does not grow with the
length of the training. The last line sets it against the whole training of the recipe, as many steps as its tokens
fill, each as long as those that were timed.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from options import recipe_parser
from rich.console import Console
from turns import KEEP_FREED_MEMORY, turn

from toolkit import flow
from toolkit.mtp import HeadTraining, new_head
from toolkit.plan import make_plan
from toolkit.recipe import load as load_recipe
from toolkit.training import train_adapter


class Job:
    """A recipe's model, adapter and data, trained anew each time."""

    def __init__(self, given: argparse.Namespace) -> None:
        recipe = load_recipe(given.recipe, given.overrides, note=lambda line: print(line))
        self.plan, self.given = make_plan(recipe), given
        base, self.tokenizer = flow.load(self.plan)
        self.batches = flow.build_batches(self.tokenizer, self.plan)
        self.model = flow.attach(base, self.plan)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        self.head: HeadTraining | None = None

    def run(self, *, headed: bool) -> tuple[float, float]:
        """Seconds on the clock and of the processor."""
        named, recipe = dict(self.model.named_parameters()), self.plan.recipe
        with torch.no_grad():
            for name, value in self.start.items():
                named[name].copy_(value)
        self.head = None
        if headed:
            self.head = HeadTraining(new_head(self.model.get_base_model()), self.model, depth=self.given.depth)
        arguments = recipe.training.model_dump(exclude={"output_dir"})
        changes = {"max_steps": self.given.steps, "save_steps": 10**6, "logging_steps": 10**6, "report_to": []}
        clock, processor = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            train_adapter(
                self.model, self.tokenizer, self.batches.train, None, folder=Path(folder) / "checkpoints",
                metrics=Path(folder) / "metrics.jsonl", arguments={**arguments, **changes}, device=self.plan.device,
                dtype=self.plan.dtype, train_router=recipe.lora.router, console=Console(quiet=True), head=self.head,
            )  # fmt: skip
        return time.perf_counter() - clock, time.process_time() - processor

    def whole(self) -> int:
        """Optimizer steps of the recipe's whole training, if its packed rows are full."""
        training = self.plan.recipe.training
        tokens = sum(map(len, self.batches.train["input_ids"])) * training.num_train_epochs
        full = math.ceil(tokens / (flow.step_tokens(self.plan) * training.gradient_accumulation_steps))
        return training.max_steps or full

    def afterwards(self) -> tuple[float, float]:
        """The same of the model's own answers."""
        assert self.head is not None
        clock, processor = time.perf_counter(), time.process_time()
        flow.teach_own_answers(self.head, self.tokenizer, self.batches, self.plan, Console(quiet=True))
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
    found: dict[str, list[Any]] = {"without": [], "with": []}
    for number in range(-1, given.repeats):
        for name in turn(list(found), number):
            seconds = job.run(headed=name == "with")
            print(f"round {number + 1}: {name} {seconds[0]:.2f} s, processor {seconds[1]:.2f} s", flush=True)
            if number >= 0:
                found[name].append(seconds)
    medians = {name: [statistics.median(each) for each in zip(*times, strict=True)] for name, times in found.items()}
    own = (0.0, 0.0)
    if job.plan.recipe.mtp.own_answers:
        job.run(headed=True)
        own = job.afterwards()
        print(f"own answers: {job.plan.recipe.mtp.own_answers} prompts, {own[0]:.2f} s, processor {own[1]:.2f} s")
    steps = job.whole()
    for index, what in enumerate(("clock", "processor")):
        without, headed = medians["without"][index], medians["with"][index]
        share, whole = headed / without - 1, (headed + own[index] * given.steps / steps) / without - 1
        print(
            f"{what}: {without:.2f} s without, {headed:.2f} s with a head of depth {given.depth}: {share:+.1%}; of the "
            f"recipe's {steps} steps, own answers counted: {whole:+.1%}"
        )


if __name__ == "__main__":
    main()
