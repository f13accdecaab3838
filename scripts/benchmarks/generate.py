#!/usr/bin/env python3
"""Tokens a second that an adapted model writes and reads on this CPU: onecard against stock transformers + PEFT.

    .venv/bin/python scripts/benchmarks/generate.py [--checkpoints smollm2 random] [--batches 1 16] [--prompt 32]
        [--new 32] [--prefill 1024] [--repeats 3] [--only ARM …] [--json FILE]

Arms: ours on int8, and stock with the same adapter, as PEFT computes it and merged into the weights, each in fp32 and
bf16. Stock takes for each job the faster of its expert implementations that run on a CPU. All write greedily, all
prompts are random tokens, and no end token ends an answer. Stock runs in a second environment, made once. Arms take
turns, each in a process of its own. Exit status 1 where the logits after a prompt differ in fp32 by more than
`--within`: stock's weights are not rounded to int8.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from turns import Worker, alternate, serve, summary

__all__ = ["main"]

ARMS = ("ours, fp32", "ours, bf16", *(f"stock{how}, {dtype}" for how in ("", " merged") for dtype in ("fp32", "bf16")))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXPERTS = ("grouped_mm", "batched_mm")
"""transformers' implementations; its eager one is slower than both by far. The second copies a matrix for each routed
row, which many rows have no memory for."""
MOST_COPIED = 64
"""Rows up to which that one is tried."""
UPDATE = 0.02
"""Standard deviation of the adapter's B: an adapter that counts."""


def build_ours(model: str, adapter: Path, dtype: torch.dtype, rank: int) -> Any:
    """Our model with the adapter, which is made where it is not there."""
    from toolkit.adapters import attach_lora, load_adapter
    from toolkit.ops.few_queries import attend_to_few_together
    from toolkit.quant import load_int8

    base, _ = load_int8(model, dtype=dtype)
    if not adapter.is_dir():
        made = attach_lora(base, r=rank)
        torch.manual_seed(0)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=UPDATE)
        made.save_pretrained(str(adapter), save_embedding_layers=False)
        base, _ = load_int8(model, dtype=dtype)
    attend_to_few_together(base)
    return load_adapter(base, adapter)


def build_stock(model: str, adapter: Path, dtype: torch.dtype, *, merged: bool) -> Any:
    """transformers' model with PEFT's adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    adapted = PeftModel.from_pretrained(base, str(adapter))
    return adapted.merge_and_unload() if merged else adapted


def with_experts(model: Any, name: str) -> Any:
    """Stock's model, its experts computed by this implementation."""
    (model.get_base_model() if hasattr(model, "get_base_model") else model).set_experts_implementation(name)
    return model


@torch.no_grad()
def once(model: Any, do: str, batch: int, prompt: int, new: int) -> tuple[float, torch.Tensor]:
    """Seconds to write so many tokens after each prompt, or to read the prompts, and the last logits read."""
    words = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(5, words, (batch, prompt), generator=torch.Generator().manual_seed(1))
    started = time.perf_counter()
    if do == "write":
        answer = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, "min_new_tokens": new}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **answer)
        logits = torch.empty(0)
    else:
        logits = model(input_ids=ids, logits_to_keep=1).logits
    return time.perf_counter() - started, logits


def answer(arm: str) -> Callable[..., dict[str, Any]]:
    """What a worker of this arm does: `build`, `write`, `read` or `logits`."""
    built: list[Any] = []
    fastest: dict[tuple[Any, ...], str] = {}
    who, dtype = arm.split(", ")

    def respond(do: str, **given: Any) -> dict[str, Any]:
        if do == "build":
            from transformers.utils import logging

            logging.disable_progress_bar()
            model, adapter = given["model"], Path(given["adapter"])
            built.append(
                build_ours(model, adapter, DTYPES[dtype], given["rank"])
                if who == "ours"
                else build_stock(model, adapter, DTYPES[dtype], merged=who == "stock merged")
            )
            built[0].eval()
            return {}
        (model,) = built
        question = do, given["batch"], given["prompt"], given.get("new", 0)
        if who != "ours" and question not in fastest:
            tried = EXPERTS if given["batch"] * given["prompt"] <= MOST_COPIED else EXPERTS[:1]
            fastest[question] = min(tried, key=lambda name: once(with_experts(model, name), *question)[0])
        model = model if who == "ours" else with_experts(model, fastest[question])
        seconds, logits = once(model, *question)
        return {"logits": logits.float()[0, -1].tolist()} if do == "logits" else {"seconds": seconds}

    return respond


def measure(checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each arm at each job, and how far fp32's logits are apart."""
    jobs = {f"write, batch {batch}": ("write", batch, options.prompt, batch * options.new) for batch in options.batches}
    jobs["read"] = ("read", 1, options.prefill, options.prefill)
    speed: dict[str, Any] = {}
    with ExitStack() as stack:
        adapter = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapter"
        workers = {}
        for name in options.only:
            own = name.startswith("ours")
            python = sys.executable if own else options.python
            worker = Worker(python, Path(__file__), threads=options.threads, tuned=True, arguments=[name], own=own)
            workers[name] = stack.enter_context(worker)
            worker.ask(do="build", model=str(checkpoint), adapter=str(adapter), rank=options.rank)
            print(f"{name}: loaded", file=sys.stderr, flush=True)
        for job, (do, batch, prompt, tokens) in jobs.items():
            question = {"do": do, "batch": batch, "prompt": prompt, "new": options.new}

            def run(worker: Worker, question: dict[str, Any] = question) -> Callable[[], float]:
                return lambda: float(worker.ask(**question)["seconds"])

            seconds = alternate({name: run(worker) for name, worker in workers.items()}, options.repeats)
            speed[job] = {name: summary([tokens / each for each in runs]) for name, runs in seconds.items()}
        fp32 = [
            torch.tensor(workers[name].ask(do="logits", batch=1, prompt=options.prompt)["logits"])
            for name in ("ours, fp32", "stock merged, fp32")
            if name in workers
        ]
    apart = float((fp32[0] - fp32[-1]).abs().max() / fp32[-1].abs().max())
    return {"speed": speed, "apart": apart}


def show(name: str, found: dict[str, Any]) -> None:
    """The table, and ours against stock's best."""
    print(f"\n{name}: tokens a second, median (least–most); logits in fp32 {found['apart']:.1e} of the largest apart")
    for job, arms in found["speed"].items():
        print(job)
        for arm, each in arms.items():
            print(f"  {arm:22s} {each['median']:8.1f} ({each['min']:.1f}–{each['max']:.1f})")
        ours, stock = (
            max((each["median"] for arm, each in arms.items() if arm.startswith(who)), default=0.0)
            for who in ("ours", "stock")
        )
        if stock:
            print(f"  ours, best, against stock's best: {ours / stock:.2f}×")


def main() -> int:
    """Exit status."""
    from experts import PEERS
    from second_environment import python_with
    from train import CHECKPOINTS, make_random

    options = _options()
    if not any(name.endswith("fp32") for name in options.only):
        print("generate.py: --only: one of the arms has to be in fp32, whose logits are compared", file=sys.stderr)
        return 2
    options.python = str(python_with(options.peers, PEERS))
    result, wrong = {}, []
    for name in options.checkpoints:
        checkpoint = CHECKPOINTS.get(name, Path(name))
        if name == "random" and not checkpoint.is_dir():
            make_random(checkpoint, 4)
        if not checkpoint.is_dir():
            print(f"generate.py: {checkpoint}: no such folder; scripts/make_smollm2_moe.py makes it", file=sys.stderr)
            return 1
        result[name] = measure(checkpoint.resolve(), options)
        show(name, result[name])
        if result[name]["apart"] > options.within:
            wrong.append(f"{name}: fp32's logits are {result[name]['apart']:.1%} apart")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    for line in wrong:
        print(f"generate.py: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    from experts import parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="+", default=["smollm2", "random"], help="smollm2, random or a folder")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="prompts answered at a time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the prompt that is only read")
    parser.add_argument("--within", type=float, default=0.05, help="of the largest logit, in fp32")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each arm")
    parser.add_argument("--only", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help="ours first")
    return parse(parser)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in ARMS:
        serve(answer(sys.argv[1]))
    else:
        sys.exit(main())
