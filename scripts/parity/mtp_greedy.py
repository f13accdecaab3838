"""Greedy text with a head's drafts against transformers' own `generate`, token for token, on held-out prompts.

    .venv/bin/python scripts/parity/mtp_greedy.py RUN [RUN …] [--prompts 200] [--tokens 16] [--drafts 1 3]
    .venv/bin/python scripts/parity/mtp_greedy.py --native FAMILY OUT [--taught 300]

A run is a folder of `onecard train` with `mtp.enabled`. The second form writes a small checkpoint of a family that
carries a head of its own, with the embedded model's tokenizer, so that a run can be made on it. Its numbers are random,
and a model of such writes what no head can guess: `--taught` trains all but the head for as many steps on the
quickstart's definitions. Prints one line a run and number of drafts, and exits with 1 where any text differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from toolkit import run as job
from toolkit.mtp.decode import Counts
from toolkit.mtp.drafts import speculator
from toolkit.plan import make_plan
from toolkit.recipe import load as load_recipe

__all__ = ["compare", "main", "write_native"]

NANO = Path(__file__).resolve().parents[2] / "recipes/quickstart/nano-qwen3moe-2m"
TEXT = NANO.parent / "data/define.train.jsonl"
WEIGHTS = "model.safetensors"
BATCH, LENGTH = 8, 96
BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def write_native(family: str, out: Path, taught: int) -> None:
    """A checkpoint of this family, a head in it, four times as wide as those of the tests, taught for some steps."""
    from tests.harness.native_heads import native_checkpoint

    words = len(json.loads((NANO / "tokenizer.json").read_text())["model"]["vocab"]) + 64
    native_checkpoint(family, out, changes={"vocab_size": words, "hidden_size": 128})
    for name in BESIDE:
        shutil.copyfile(NANO / name, out / name)
    if taught:
        _teach(out, taught)


def _teach(folder: Path, steps: int) -> None:
    """All weights but the head's, on the quickstart's definitions one after the other; the files stay what they are."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line)["messages"] for line in TEXT.read_text().splitlines()]
    text = torch.tensor([token for row in rows for token in tokenizer.apply_chat_template(row, return_dict=False)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(0)
    for step in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=random)
        ids = text[starts + torch.arange(LENGTH)]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1.0 - step / steps)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    with tempfile.TemporaryDirectory() as learnt:
        model.save_pretrained(learnt)
        weights = {**load_file(folder / WEIGHTS), **load_file(Path(learnt) / WEIGHTS)}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def compare(run: Path, prompts: slice, tokens: int, drafts: list[int]) -> bool:
    """Whether all texts of a run are the same, with each number of drafts."""
    plan = make_plan(load_recipe(run / "recipe.yaml", [f"training.output_dir={run}"], note=lambda line: None))
    model, tokenizer = job.reopen(plan, run / "adapter")
    model.eval()
    asked = [list(question.prompt_ids) for question in job.build_batches(tokenizer, plan).held_out[prompts]]
    head = job.reopen_head(model, plan, run / "adapter")
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
    accepted, proposed = sum(counts.accepted.values()), sum(counts.proposed.values())
    print(
        f"{run.name:24} {count} drafts: {same} of {asked} texts the same; tau {counts.tokens_per_pass:.2f}, {accepted} "
        f"of {proposed} drafts accepted, {counts.replayed} near ties decided plainly; {seconds:.0f} s, generate "
        f"{plain:.0f} s",
        flush=True,
    )


def main() -> int:
    """Compare the runs, or write a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--native", nargs=2, metavar=("FAMILY", "OUT"))
    parser.add_argument("--taught", type=int, default=0, metavar="STEPS")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--skip", type=int, default=0, help="Prompts that another process takes.")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 3])
    given = parser.parse_intermixed_args()
    if given.native:
        write_native(given.native[0], Path(given.native[1]), given.taught)
    prompts = slice(given.skip, given.skip + given.prompts)
    results = [compare(run, prompts, given.tokens, given.drafts) for run in given.runs]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
