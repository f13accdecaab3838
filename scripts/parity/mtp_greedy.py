"""Greedy text with a head's drafts against transformers' own `generate`, token for token, on held-out prompts.

    .venv/bin/python scripts/parity/mtp_greedy.py RUN [RUN …] [--prompts 200] [--tokens 16] [--drafts 1 3]
    .venv/bin/python scripts/parity/mtp_greedy.py --native FAMILY OUT

A run is a folder of `onecard train` with `mtp.enabled`. The second form writes a small random checkpoint of a family
that carries a head of its own, with the embedded model's tokenizer, so that a run can be made on it. Prints one line a
run and number of drafts, and exits with 1 where any text differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from toolkit import flow
from toolkit.evaluate import speculator
from toolkit.mtp import Counts
from toolkit.plan import make_plan
from toolkit.recipe import load as load_recipe

__all__ = ["compare", "main", "write_native"]

NANO = Path(__file__).resolve().parents[2] / "recipes/quickstart/nano-qwen3moe-2m"
BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def write_native(family: str, out: Path) -> None:
    """A checkpoint of this family, a head in it, four times as wide as those of the tests."""
    from tests.parity.native_heads import native_checkpoint

    words = len(json.loads((NANO / "tokenizer.json").read_text())["model"]["vocab"]) + 64
    native_checkpoint(family, out, changes={"vocab_size": words, "hidden_size": 128})
    for name in BESIDE:
        shutil.copyfile(NANO / name, out / name)


def compare(run: Path, prompts: int, tokens: int, drafts: list[int]) -> bool:
    """Whether all texts of a run are the same, with each number of drafts."""
    plan = make_plan(load_recipe(run / "recipe.yaml", [f"training.output_dir={run}"], note=lambda line: None))
    model, tokenizer = flow.reopen(plan, run / "adapter")
    model.eval()
    asked = [list(question.prompt_ids) for question in flow.build_batches(tokenizer, plan).held_out[:prompts]]
    head = flow.reopen_head(model, plan, run / "adapter")
    started = time.perf_counter()
    expected = [_plain(model, prompt, tokens) for prompt in asked]
    plain = time.perf_counter() - started
    fine = True
    for count in drafts:
        writer = speculator(model, head, count=count, max_new_tokens=tokens, measured=False)
        started = time.perf_counter()
        same = sum(a == b for a, b in zip(expected, writer.generate(asked), strict=True))
        _tell(run, same, len(asked), count, writer.counts, time.perf_counter() - started, plain)
        fine &= same == len(asked)
    return fine


@torch.no_grad()
def _plain(model: Any, prompt: list[int], tokens: int) -> list[int]:
    written = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    answer: list[int] = written[0, len(prompt) :].tolist()
    return answer


def _tell(run: Path, same: int, asked: int, count: int, counts: Counts, seconds: float, plain: float) -> None:
    print(
        f"{run.name:24} {count} drafts: {same} of {asked} texts the same; tau {counts.tokens_per_pass:.2f}, "
        f"{counts.replayed} near ties decided plainly; {seconds:.0f} s, generate {plain:.0f} s",
        flush=True,
    )


def main() -> int:
    """Compare the runs, or write a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--native", nargs=2, metavar=("FAMILY", "OUT"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 3])
    given = parser.parse_intermixed_args()
    if given.native:
        write_native(given.native[0], Path(given.native[1]))
    results = [compare(run, given.prompts, given.tokens, given.drafts) for run in given.runs]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
