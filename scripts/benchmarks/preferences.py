#!/usr/bin/env python3
"""What preferences teach beyond imitation: the quickstart, then right categories against the model's own wrong ones.

    .venv/bin/python scripts/benchmarks/preferences.py FOLDER [--base smollm2] [--methods dpo kto] [--seeds 1 2 3]

For each seed the quickstart, or SmolLM2-MoE, is trained as its recipe says. That adapter answers training and held-out
prompts by beam search; its most probable wrong category is the rejected answer. Each method then starts from that
adapter. All are judged on the same held-out rows: the share of pairs whose right answer is the more probable one, the
share whose right answer gained more than the wrong one, and exact match over all prompts. Runs that are there are not
repeated. Overrides, `section.key=value`, stand before the options.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"

__all__ = ["main"]

_METHODS: Mapping[str, Sequence[str]] = {
    "dpo": [],
    "kto": ["kto.beta=0.3"],
    "orpo": ["training.method=orpo", "dpo.loss_type=sigmoid"],
    "simpo": ["training.method=simpo", "dpo.loss_type=sigmoid"],
}
"""What differs from the recipe."""
_RECIPES = {"kto": "quickstart-kto.yaml"}


@dataclass(frozen=True)
class Base:
    """What is trained.

    Args:
        recipe: teaches it the task. rows, held_out: prompts that it answers, for training and judging.
        learns: overrides of each method's recipe; an adapter that knows the task takes smaller steps than one that
            begins. shorter: the same of the methods that lose right answers in longer runs.
    """

    recipe: str
    rows: int
    held_out: int
    learns: Sequence[str]
    shorter: Mapping[str, Sequence[str]]


_SMOLLM2 = ["model.model_name_or_path=models/smollm2-moe", "data.system_prompt=Answer in one word."]
_BASES: Mapping[str, Base] = {
    "quickstart": Base(
        "quickstart.yaml",
        6000,
        500,
        ["training.learning_rate=1e-3"],
        {"dpo": ["training.num_train_epochs=3"], "kto": ["data.max_samples=1300"]},
    ),
    "smollm2": Base("smollm2-moe.yaml", 1280, 200, [*_SMOLLM2, "training.learning_rate=2e-4"], {}),
}
_BEAMS, _TOGETHER = 6, 32
"""Answers of each prompt that are looked at, and prompts that are answered together."""


def finished(recipe: str, folder: Path, overrides: Sequence[str]) -> Any:
    """The run in `folder`, trained now where it is not there."""
    from rich.console import Console

    from toolkit import load_recipe, run_recipe

    recipe_of = load_recipe(RECIPES / recipe, [*overrides, f"training.output_dir={folder}"])
    return run_recipe(recipe_of, console=Console(stderr=True, quiet=False))


def write_pairs(run: Any, folder: Path, rows: int, held_out: int) -> None:
    """Pairs of the run's own answers to the first `rows` training prompts and to the first held-out ones."""
    from toolkit import load_recipe, make_plan
    from toolkit.run.data import dialogue
    from toolkit.run.model import reopen

    folder.mkdir(parents=True, exist_ok=True)
    plan = make_plan(load_recipe(run.folder / "recipe.yaml"), for_training=False)
    model, tokenizer = reopen(plan, run.adapter)
    model.eval()
    asks = dialogue(tokenizer, plan, run.adapter)
    for split, most in (("train", rows), ("validation", held_out)):
        path = folder / f"pairs.{split}.jsonl"
        if path.is_file():
            continue
        lines = (RECIPES / "quickstart" / "data" / f"category.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        asked = [json.loads(line)["messages"] for line in lines[:most]]
        prompts = [asks.prompt_ids(row[:1]) for row in asked]
        wrong = wrong_answers(model, tokenizer, prompts, [row[1]["content"] for row in asked])
        pairs = [
            {"prompt": row[:1], "chosen": row[1:2], "rejected": [{"role": "assistant", "content": other}]}
            for row, other in zip(asked, wrong, strict=True)
            if other is not None
        ]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def wrong_answers(model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], right: Sequence[str]) -> list[str | None]:
    """Of each prompt's tokens the most probable wrong category among the model's best answers, by beam search."""
    import torch

    known = set(right)
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    found: list[str | None] = [None] * len(ids)
    for start in range(0, len(order), _TOGETHER):
        batch = order[start : start + _TOGETHER]
        padded = tokenizer.pad({"input_ids": [ids[n] for n in batch]}, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            beams = model.generate(
                **padded, max_new_tokens=6, num_beams=_BEAMS, num_return_sequences=_BEAMS, do_sample=False
            )
        texts = [
            tokenizer.decode(beam, skip_special_tokens=True).strip()
            for beam in beams[:, padded["input_ids"].shape[1] :]
        ]
        for place, number in enumerate(batch):
            best = texts[place * _BEAMS : (place + 1) * _BEAMS]
            found[number] = next((text for text in best if text in known and text != right[number]), None)
    return found


@dataclass(frozen=True)
class Judged:
    """An adapter on the held-out pairs (`table`), nats of each answer; and its exact match on held-out prompts."""

    table: Any
    logps: Sequence[float]
    exact_match: float

    def told(self, start: Judged) -> str:
        """Its figures, against the adapter that it started from."""
        from toolkit.evaluate.preferences import answer_figures, reward_figures

        gains = [now - before for now, before in zip(self.logps, start.logps, strict=True)]
        right = answer_figures(self.logps, self.table)["preference_accuracy"]
        gained = "-" if start is self else f"{reward_figures(gains, self.table)['rewards/accuracies']:.1%}"
        return (
            f"right answer more probable {right:.1%}, gained more {gained}, exact match {self.exact_match:.1%}"
            f" ({len(self.logps) // 2} pairs)"
        )


def judged(run: Any, recipe: str, pairs: Path, learns: Sequence[str], held_out: int) -> Judged:
    """The run's adapter on the held-out pairs, and on the first held-out prompts of `recipe`, which taught the task."""
    from toolkit import load_recipe, make_plan
    from toolkit.evaluate import score_now
    from toolkit.evaluate.preferences import answer_logps
    from toolkit.run.data import build_batches
    from toolkit.run.model import reopen

    data = [f"data.train={pairs}", f"data.validation={pairs}", *learns]
    plan = make_plan(load_recipe(RECIPES / "quickstart-dpo.yaml", data), for_training=False)
    whole = make_plan(load_recipe(RECIPES / recipe), for_training=False)
    model, tokenizer = reopen(plan, run.adapter)
    model.eval()
    table, asked = (build_batches(tokenizer, each) for each in (plan, whole))
    questions = asked.held_out[:held_out]
    exact = score_now(model, tokenizer, questions, metric="exact_match", max_new_tokens=8, batch_size=100)
    return Judged(table.validation, answer_logps(model, table.validation, 100), exact["exact_match"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the runs that start from it")
    parser.add_argument("--base", choices=list(_BASES), default="quickstart")
    parser.add_argument("--methods", nargs="+", choices=list(_METHODS), default=["dpo", "kto"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rows", type=int, help="training prompts that the model answers")
    parser.add_argument("--held-out", type=int, help="prompts that it is judged by")
    options = parser.parse_intermixed_args(arguments)
    base, cut = _BASES[options.base], ["eval.max_samples=100"]
    rows, held_out = options.rows or base.rows, options.held_out or base.held_out
    for seed in options.seeds:
        place = options.folder / f"seed-{seed}"
        held = place / "pairs.validation.jsonl"
        start = finished(base.recipe, place / "sft", [f"training.seed={seed}", *cut])
        write_pairs(start, place, rows, held_out)
        first = judged(start, base.recipe, held, base.learns, held_out)
        print(f"seed {seed}  sft    {first.told(first)}", flush=True)
        for method in options.methods:
            given = [f"data.train={place / 'pairs.train.jsonl'}", f"data.validation={held}", f"training.seed={seed}"]
            given += [f"lora.adapter_name_or_path={start.adapter}", *cut, *_METHODS[method], *base.learns]
            given += [*base.shorter.get(method, ()), *options.overrides]
            run = finished(_RECIPES.get(method, "quickstart-dpo.yaml"), place / method, given)
            figures = judged(run, base.recipe, held, base.learns, held_out).told(first)
            print(f"seed {seed}  {method:5}  {figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
