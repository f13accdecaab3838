#!/usr/bin/env python3
"""`quantization.linears` side by side: weight-only int8, bitsandbytes' layer, none; the experts are int8 in every arm.

    .venv/bin/python scripts/benchmarks/linears.py MODEL HELD_OUT.jsonl[,…] [--held-out 60] [--tokens 512] [--repeats 5]

The arms take turns in one process, with glibc told to keep freed memory. A step is forward and backward to the input
embeddings over one batch of real tokens, as LoRA asks of a frozen base. The loss's distance to the fp32 model has its
standard error over the examples. bitsandbytes' layer is asked for as the recipe does, threshold 0.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

import torch
from quantization_error import _examples, _gap, _losses
from transformers import PreTrainedModel
from transformers.utils import logging
from turns import KEEP_FREED_MEMORY, alternate, summary

import toolkit.ops.registry  # noqa: F401  (registers the expert backends)
from toolkit.quant import load_int8

ARMS = ("int8", "bnb", "none")


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    if any(os.environ.get(key) != value for key, value in KEEP_FREED_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})
    logging.disable_progress_bar()
    held_out = _examples(arguments, arguments.held_out_files, arguments.held_out)
    tokens = torch.tensor([len(row) - 1 for row in sorted(held_out, key=len, reverse=True)]).double()
    loaded = {linears: load_int8(arguments.model, linears=linears) for linears in ARMS}
    models = {linears: model for linears, (model, _) in loaded.items()}
    ids = torch.tensor([token for row in held_out for token in row][: arguments.tokens])[None]
    seconds = alternate({linears: _step(model, ids) for linears, model in models.items()}, arguments.repeats)
    original, _ = load_int8(arguments.model, experts="none", linears="none")
    reference = _losses(original, held_out)
    print(
        f"{arguments.model}: {len(held_out)} examples, {int(tokens.sum())} tokens; a step of {ids.numel()} tokens, "
        f"{arguments.repeats} rounds, {torch.get_num_threads()} threads"
    )
    print(f"{'linears':10}{'loss to fp32':>14}{'± s.e.':>10}{'step s':>9}{'least':>8}{'most':>8}{'MB':>8}")
    for linears, model in models.items():
        gap, spread = _gap(_losses(model, held_out), reference, tokens)
        times, size = summary(seconds[linears]), loaded[linears][1].model_bytes / 1e6
        print(
            f"{linears:10}{gap:+14.4%}{spread:10.4%}{times['median']:9.2f}{times['min']:8.2f}{times['max']:8.2f}{size:8.0f}"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("held_out_files", type=lambda text: text.split(","))
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def _step(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits: torch.Tensor = model(inputs_embeds=x, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
        assert x.grad is not None
        return time.perf_counter() - started

    return run


if __name__ == "__main__":
    main()
