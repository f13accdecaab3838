#!/usr/bin/env python3
"""The whole fine-tuning job on this CPU, with real chat data: onecard against what else there is.

    .venv/bin/python scripts/benchmarks/train.py [--checkpoints embedded random smollm2] [--train FILE.jsonl …]
        [--validation FILE.jsonl …] [--examples 64] [--repeats 3] [--only ARM …] [--profile]
        [--json FILE] [--plot FILE.svg]

Arms: onecard packed with activations recomputed (a recipe's defaults), with activations kept, and on padded batches of
eight; stock TRL + PEFT `target_parameters` at its defaults and with activations kept; experts4bit-qlora in int8. Ours
and stock in bf16, too. All train the same examples at about the same number a step; stock starts from our fresh
adapter. Peers run in a second environment, made once. Arms take turns; peak memory is the anonymous memory of a fresh
process with glibc's defaults, training and loading apart. `embedded` is the quickstart's job; `random` a checkpoint of
128 experts a layer that is made at the first call; smollm2 is made by scripts/make_smollm2_moe.py. Exit status 1 where
held-out loss of the same batches is over 1% from stock's, or packing changes the loss.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experts import PEERS, ROOT, Arm, parse, python_with
from train_arms import Job
from turns import Worker, alternate, summary

DATA = ROOT / "recipes" / "quickstart" / "data"
TOKENIZER = ROOT / "recipes" / "quickstart" / "nano-qwen3moe-2m"
PROGRAM = Path(__file__).with_name("train_arms.py")
CHECKPOINTS = {
    "embedded": TOKENIZER,
    "random": ROOT / "models" / "random-128-experts",
    "smollm2": ROOT / "models" / "smollm2-moe",
}
JOBS: dict[str, dict[str, Any]] = {
    "embedded": {"data": "category", "examples": 500, "batch": 20, "length": 1024, "learning_rate": 3e-3},
    "": {"data": "dialog", "examples": 64, "batch": 8, "length": 512, "learning_rate": 2e-4},
}
"""What is trained, where options do not say it; without a name of all other checkpoints."""
ARMS = {
    "ours": Arm("ours", "packed"),
    "ours, activations kept": Arm("ours", "packed, kept"),
    "ours, padded": Arm("ours", "padded"),
    "ours, bf16": Arm("ours bf16", "packed"),
    "ours, bf16, activations kept": Arm("ours bf16", "packed, kept"),
    "stock TRL + PEFT": Arm("stock", "default"),
    "stock, activations kept": Arm("stock", "kept"),
    "stock, bf16": Arm("stock bf16", "default"),
    "stock, bf16, activations kept": Arm("stock bf16", "kept"),
    "experts4bit-qlora int8": Arm("experts4bit", ""),
}
LOSS_WITHIN, PACKED_WITHIN = 0.01, 1e-5
PRODUCTS = ("_int_mm", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product")
"""Operators that are matrix products, by the beginnings of their names."""
MOST_OPERATORS = 12
Figures = dict[str, Any]


def make_random(folder: Path, layers: int) -> None:
    """A Qwen3-MoE with random weights, 128 experts a layer and the quickstart's tokenizer.

    The vocabulary is padded so that the head takes about the share of the work that it takes in a 30B-A3B.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=8192, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=512,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4, head_dim=64, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=True, eos_token_id=tokenizer.eos_token_id, dtype="bfloat16",
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    partial = folder.with_name(f"{folder.name}.partial")
    AutoModelForCausalLM.from_config(config).save_pretrained(partial, max_shard_size="500MB")
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def draw(files: Sequence[Path], count: int, seed: int, target: Path) -> str:
    """Write `count` random rows of all files to one."""
    rows = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line]
    target.write_text("\n".join(random.Random(seed).sample(rows, min(count, len(rows)))) + "\n", encoding="utf-8")
    return str(target)


def is_ours(worker: str) -> bool:
    """Whether it runs in this environment."""
    return worker.startswith("ours")


@contextmanager
def workers(names: Sequence[str], job: Job, options: argparse.Namespace) -> Iterator[dict[str, Worker]]:
    """One process for each name, its model loaded; ours first, which prepares the job."""
    with ExitStack() as stack:
        running = {}
        for name in sorted(names, key=lambda name: name != "ours"):
            python = sys.executable if is_ours(name) else options.python
            worker = Worker(python, PROGRAM, threads=options.threads, tuned=True, arguments=[name], own=is_ours(name))
            running[name] = stack.enter_context(worker)
            running[name].ask(do="build", job=asdict(job))
            print(f"{name}: loaded", file=sys.stderr, flush=True)
        yield running


def peak_memory(arms: Mapping[str, Arm], job: Job, options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """The most anonymous bytes of a fresh process while it loads, and while it trains for the first time."""
    found = {}
    for name, arm in arms.items():
        own = is_ours(arm.worker)
        python = sys.executable if own else options.python
        with Worker(python, PROGRAM, threads=options.threads, tuned=False, arguments=[arm.worker], own=own) as worker:
            found[name] = {
                "loading": worker.most_anonymous(do="build", job=asdict(replace(job, runs=1))),
                "training": worker.most_anonymous(do="run", variant=arm.variant),
            }
        print(f"{name}: peak {found[name]}", file=sys.stderr, flush=True)
    return found


def measure(name: str, checkpoint: Path, folder: Path, options: argparse.Namespace) -> Figures:
    """All figures of one checkpoint."""
    asked = {key: value for key, value in vars(options).items() if value is not None}
    usual = JOBS.get(name, JOBS[""])
    given = {
        "train": [DATA / f"{usual['data']}.train.jsonl"],
        "validation": [DATA / f"{usual['data']}.validation.jsonl"],
        **usual,
        **asked,
    }
    job = Job(
        model=str(checkpoint),
        train=draw(given["train"], given["examples"], options.seed, folder / "train.jsonl"),
        validation=draw(given["validation"], given["examples"], options.seed, folder / "validation.jsonl"),
        folder=str(folder),
        batch=given["batch"],
        length=given["length"],
        rank=options.rank,
        learning_rate=given["learning_rate"],
        seed=options.seed,
        backend=options.backend,
        runs=options.repeats + 1,
    )
    arms = {name: arm for name, arm in ARMS.items() if not options.only or name in options.only}
    last: dict[str, dict[str, Any]] = {}

    def turn(name: str, worker: Worker) -> Callable[[], float]:
        def run() -> float:
            # The uncounted first round measures the loss as well, which takes longer than a run.
            last[name] = {
                **last.get(name, {}),
                **worker.ask(do="run", variant=arms[name].variant, held_out=name not in last),
            }
            return float(last[name]["seconds"])

        return run

    with workers({arm.worker for arm in arms.values()}, job, options) as running:
        packing = running["ours"].ask(do="packing")
        seconds = alternate({name: turn(name, running[arm.worker]) for name, arm in arms.items()}, options.repeats)
        profile = running["ours"].ask(do="profile", variant=ARMS["ours"].variant) if options.profile else {}
    rows = job.rows("train")
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {
        "job": {**asdict(job), "model": checkpoint.name, "folder": None, "train": None, "validation": None},
        "examples": len(rows),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": {name: summary([tokens / each for each in runs]) for name, runs in seconds.items()},
        "steps": {name: each["steps"] for name, each in last.items()},
        "loss": {name: each["loss"] for name, each in last.items()},
        "held_out_loss": {name: each["held_out"] for name, each in last.items()},
        "packing": {**packing, "difference": abs(packing["packed"] / packing["padded"] - 1)},
        "profile": profile,
        "peak": peak_memory(arms, job, options) if options.memory else {},
    }


def show(name: str, figures: Figures) -> None:
    """One checkpoint's table."""
    speeds, packing = figures["tokens_per_second"], figures["packing"]
    print(f"\n{name}: {figures['examples']} examples, {figures['tokens']} tokens without padding")
    columns = ("ours is", 8), ("steps", 6), ("held-out loss", 14), ("peak MB", 8), ("loading", 8)
    print(f"{'':26} {'tokens/s (least–most)':>24}", *(f"{what:>{width}}" for what, width in columns))
    for arm, speed in speeds.items():
        spread = f"{speed['median']:.1f} ({speed['min']:.1f}–{speed['max']:.1f})"
        times = speeds["ours"]["median"] / speed["median"]
        peak = "".join(
            f" {figures['peak'][arm][when] / 1e6:>8.0f}" for when in ("training", "loading") if figures["peak"]
        )
        print(f"{arm:26} {spread:>24} {times:>7.2f}× {figures['steps'][arm]:>6} "
              f"{figures['held_out_loss'][arm]:>14.4f}{peak}")  # fmt: skip
    print(f"  summed loss, packed {packing['packed']:.4f} and padded {packing['padded']:.4f}: "
          f"{packing['difference']:.1e} apart")  # fmt: skip
    if figures["profile"]:
        show_profile(figures["profile"])


def show_profile(seconds: Mapping[str, float]) -> None:
    """Where `ours` spends its processor time, operator by operator."""
    whole = sum(seconds.values())
    products = sum(value for name, value in seconds.items() if name.removeprefix("aten::").startswith(PRODUCTS))
    print(f"  ours, processor time by operator: {products / whole:.0%} in matrix products")
    for name in sorted(seconds, key=lambda name: -seconds[name])[:MOST_OPERATORS]:
        print(f"    {seconds[name] / whole:6.1%} {name}")


def complaints(name: str, figures: Figures) -> Iterator[str]:
    """What must not be."""
    losses, packing = figures["held_out_loss"], figures["packing"]
    ours = losses.get("ours, padded", losses["ours"])  # of the same batches, where they were trained on
    if "stock TRL + PEFT" in losses and not abs(ours / losses["stock TRL + PEFT"] - 1) <= LOSS_WITHIN:
        yield f"{name}: held-out loss {ours:.4f}, stock's {losses['stock TRL + PEFT']:.4f}"
    if not packing["difference"] <= PACKED_WITHIN:
        yield f"{name}: packed and padded loss are {packing['difference']:.1e} apart"


def main() -> int:
    """See the module's docstring."""
    options = _options()
    if any(not is_ours(ARMS[name].worker) for name in options.only or ARMS):
        options.python = python_with(options.peers, PEERS)
    result: Figures = {"threads": options.threads, "backend": options.backend, "checkpoints": {}}
    for name in options.checkpoints:
        checkpoint = CHECKPOINTS.get(name, Path(name))
        if name == "random" and not checkpoint.is_dir():
            shutil.rmtree(checkpoint.with_name(f"{checkpoint.name}.partial"), ignore_errors=True)
            make_random(checkpoint, options.layers)
        with tempfile.TemporaryDirectory() as folder:
            result["checkpoints"][name] = measure(name, checkpoint.resolve(), Path(folder), options)
        show(name, result["checkpoints"][name])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.plot:
        import charts

        charts.jobs(result, options.plot)
    wrong = [line for name, figures in result["checkpoints"].items() for line in complaints(name, figures)]
    for line in wrong:
        print(f"train.py: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoints", nargs="+", default=list(CHECKPOINTS), help="embedded, random, smollm2 or a folder"
    )
    parser.add_argument("--train", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--validation", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--examples", type=int, help="drawn from the training files, and held out")
    parser.add_argument("--batch", type=int, help="examples in a padded batch")
    parser.add_argument("--length", type=int, help="tokens in a packed one; longer examples are dropped")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--layers", type=int, default=4, help="of the random checkpoint, where it is made")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each arm")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), metavar="ARM", help="these arms; `ours` among them")
    parser.add_argument("--profile", action="store_true", help="and where the processor time of `ours` goes")
    return parse(parser)


if __name__ == "__main__":
    sys.exit(main())
