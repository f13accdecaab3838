#!/usr/bin/env python3
"""Preference tuning and written answers on this CPU: onecard against stock TRL + PEFT, and a head's drafts.

    .venv/bin/python scripts/benchmarks/preferences_speed.py [--checkpoints random] [--jobs dpo rollouts]
        [--examples 32] [--batch 4] [--prompts 8] [--generations 8] [--new 32] [--run RUN] [--depth 1] [--repeats 3]
        [--json FILE]

`dpo`: one epoch on the quickstart's pairs in padded batches, from one fresh adapter. Ours recomputes activations or
keeps them; so does stock's DPOTrainer, which takes the pairs as messages. `rollouts`: answers sampled to equal prompts,
as GRPO asks for them; stock's `generate` takes the faster of its expert implementations. Both in fp32 and bf16.
`--run`: the answers of a finished run that has a multi-token-prediction head, written with its drafts and without. Arms
take turns, each in a process of its own; stock's import nothing of ours. Peak memory is the anonymous memory of a fresh
process that trains once, loading apart. Exit status 1 where the held-out loss of the same pairs is over 1% off stock's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from preference_arms import WORKERS
from turns import Worker, alternate, summary

__all__ = ["main"]

PAIRS = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "data"
LOSS_WITHIN = 0.01
PROGRAM = Path(__file__).with_name("preference_arms.py")


@contextmanager
def workers(names: Sequence[str], job: dict[str, Any], options: argparse.Namespace) -> Iterator[dict[str, Worker]]:
    """Loaded processes; ours first, which prepares the job."""
    with ExitStack() as stack:
        running = {}
        for name in names:
            running[name] = stack.enter_context(_worker(name, options, tuned=True))
            running[name].ask(do="build", job=job)
            print(f"{name}: loaded", file=sys.stderr, flush=True)
        yield running


def _worker(name: str, options: argparse.Namespace, *, tuned: bool) -> Worker:
    own = name.startswith("ours")
    return Worker(sys.executable, PROGRAM, threads=options.threads, tuned=tuned, arguments=[name], own=own)


def prompts_of(folder: Path, tokenizer: Any, count: int, generations: int) -> list[list[int]]:
    """Tokens of the first pairs' prompts, each as often as it is answered."""
    lines = (folder / "pairs.train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    asked = [json.loads(line)["prompt"] for line in lines]
    ids = [list(tokenizer.apply_chat_template(each, add_generation_prompt=True)["input_ids"]) for each in asked]
    return [each for each in ids for _ in range(generations)]


def measure(checkpoint: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one checkpoint."""
    from transformers import AutoTokenizer

    for split in ("train", "validation"):
        lines = (PAIRS / f"pairs.{split}.jsonl").read_text(encoding="utf-8").splitlines()[: options.examples]
        (folder / f"pairs.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    job = {
        "model": str(checkpoint), "folder": str(folder), "batch": options.batch, "length": options.length,
        "rank": options.rank, "learning_rate": options.learning_rate,
    }  # fmt: skip
    found: dict[str, Any] = {}
    prompts = prompts_of(folder, AutoTokenizer.from_pretrained(checkpoint), options.prompts, options.generations)
    with workers(options.workers, job, options) as running:
        if "dpo" in options.jobs:
            found["dpo"] = _dpo(running, folder, options)
        if "rollouts" in options.jobs:

            def turn(worker: Worker) -> Callable[[], float]:
                asked = {"do": "rollouts", "prompts": prompts, "new": options.new}
                return lambda: float(worker.ask(**asked)["seconds_per_token"])

            seconds = alternate({name: turn(worker) for name, worker in running.items()}, options.repeats)
            found["rollouts"] = {name: {"speed": _speed(each)} for name, each in seconds.items()}
    if options.memory and "dpo" in options.jobs:
        for name, each in found["dpo"].items():
            worker_name, _, how = name.partition(", ")
            with _worker(worker_name, options, tuned=False) as worker:
                worker.ask(do="build", job=job)
                each["peak"] = worker.most_anonymous(do="dpo", kept=how == "kept")
            print(f"{name}: peak {each['peak']}", file=sys.stderr, flush=True)
    return found


def _dpo(running: Mapping[str, Worker], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    losses: dict[str, float] = {}
    arms = {
        f"{name}, {how}": (worker, how == "kept") for name, worker in running.items() for how in options.activations
    }

    def turn(name: str) -> Callable[[], float]:
        def run() -> float:
            worker, kept = arms[name]
            done = worker.ask(do="dpo", kept=kept, held_out=name not in losses)
            losses.setdefault(name, done["held_out"])
            return float(done["seconds"])

        return run

    seconds = alternate({name: turn(name) for name in arms}, options.repeats)
    tokens = sum(len(row["input_ids"]) for row in json.loads((folder / "train.json").read_text()))
    return {
        name: {"speed": _speed([each / tokens for each in runs]), "held_out_loss": losses[name]}
        for name, runs in seconds.items()
    }


def _speed(seconds_per_token: Sequence[float]) -> dict[str, float]:
    return summary([1 / each for each in seconds_per_token])


def drafts(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of a finished run's answers, with its head's drafts and without."""
    from toolkit import load_recipe, make_plan
    from toolkit.run.data import build_batches, load_tokenizer

    plan = make_plan(load_recipe(options.run / "recipe.yaml"), for_training=False)
    held_out = build_batches(load_tokenizer(plan), plan).held_out[: options.prompts]
    prompts = [list(each.prompt_ids) for each in held_out for _ in range(options.generations)]
    last: dict[str, dict[str, Any]] = {}
    with _worker("ours fp32", options, tuned=True) as worker:
        worker.ask(do="open", run=str(options.run.resolve()), new=options.new, depth=options.depth)

        def turn(how: str) -> Callable[[], float]:
            def run() -> float:
                last[how] = worker.ask(do="drafts", how=how, prompts=prompts)
                return float(last[how]["seconds_per_token"])

            return run

        seconds = alternate({how: turn(how) for how in ("with", "without")}, options.repeats)
    return {how: {"speed": _speed(each), **last[how]} for how, each in seconds.items()}


def show(name: str, found: Mapping[str, Any]) -> None:
    """The tables, and ours against stock's best."""
    for job, arms in found.items():
        print(f"\n{name}, {job}: tokens a second, median (least–most)")
        for arm, each in arms.items():
            speed = each["speed"]
            more = f"  held-out loss {each['held_out_loss']:.5f}" if "held_out_loss" in each else ""
            more += f"  peak {each['peak'] / 1e6:.0f} MB" if "peak" in each else ""
            more += f"  accepted {each['drafts/accepted']:.1%}" if "drafts/accepted" in each else ""
            print(f"  {arm:24} {speed['median']:9.1f} ({speed['min']:.1f}–{speed['max']:.1f}){more}")
        for ours, other in (("ours", "stock"), ("with", "without")):
            sides = [[each for arm, each in arms.items() if arm.split()[0] == who] for who in (ours, other)]
            if all(sides):
                best = [max(each["speed"]["median"] for each in side) for side in sides]
                print(f"  {ours}, best, against {other}'s best: {best[0] / best[1]:.2f}×")
                if all("peak" in each for side in sides for each in side):
                    least = [min(each["peak"] for each in side) for side in sides]
                    print(f"  least memory against least memory: {least[0] / least[1]:.2f}×")


def complaints(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """What must not be."""
    losses = {arm: each["held_out_loss"] for arm, each in found.get("dpo", {}).items()}
    for dtype in ("fp32", "bf16"):
        ours, stock = (
            [loss for arm, loss in losses.items() if arm.startswith(f"{w} {dtype}")] for w in ("ours", "stock")
        )
        if ours and stock and abs(ours[0] / stock[0] - 1) > LOSS_WITHIN:
            yield f"{name}, {dtype}: held-out loss {ours[0]:.5f}, stock's {stock[0]:.5f}"


def main() -> int:
    """See the module's docstring."""
    from train import CHECKPOINTS, make_random

    options, result, wrong = _options(), dict[str, Any](), list[str]()
    for name in options.checkpoints:
        checkpoint = CHECKPOINTS.get(name, Path(name))
        if name == "random" and not checkpoint.is_dir():
            make_random(checkpoint, 4)
        with tempfile.TemporaryDirectory() as folder:
            result[name] = measure(checkpoint.resolve(), Path(folder), options)
        show(name, result[name])
        wrong += complaints(name, result[name])
    if options.run:
        result["drafts"] = {"drafts": drafts(options)}
        show(options.run.name, result["drafts"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    for line in wrong:
        print(f"preferences_speed.py: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    from experts import parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="*", default=["random"], help="random, embedded, smollm2 or a folder")
    parser.add_argument("--jobs", nargs="+", choices=("dpo", "rollouts"), default=["dpo", "rollouts"])
    parser.add_argument("--workers", nargs="+", choices=WORKERS, default=WORKERS, metavar="WORKER", help="ours first")
    parser.add_argument("--activations", nargs="+", choices=("recomputed", "kept"), default=["recomputed", "kept"])
    parser.add_argument("--examples", type=int, default=32, help="pairs that are trained on, and held out")
    parser.add_argument("--batch", type=int, default=4, help="pairs in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest answer with its prompt")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--prompts", type=int, default=8, help="prompts that are answered at a time")
    parser.add_argument("--generations", type=int, default=8, help="answers to each")
    parser.add_argument("--new", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--run", type=Path, help="a finished run with a head")
    parser.add_argument("--depth", type=int, default=1, help="drafts a pass, with --run")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each arm")
    return parse(parser)


if __name__ == "__main__":
    sys.exit(main())
