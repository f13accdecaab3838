#!/usr/bin/env python3
"""What preferences teach beyond imitation: the quickstart, then right categories against the model's own wrong ones.

    .venv/bin/python scripts/benchmarks/preferences.py FOLDER [--methods dpo] [--seeds 1 2 3] [section.key=value ...]

For each seed the quickstart is trained as its recipe says. That adapter answers training and held-out prompts, sampled
at temperature 1; the first wrong category is the rejected answer. Each method then starts from that adapter. All are
judged on the same held-out rows: the share of pairs whose right answer is the more probable one, the share whose right
answer gained more than the wrong one, and exact match over all prompts. Runs that are there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"

__all__ = ["main"]

_TRIES = 8
"""Answers that are sampled to find a wrong one; a prompt without one has no pair."""


def finished(recipe: str, folder: Path, overrides: Sequence[str]) -> Any:
    """The run in `folder`, trained now where it is not there."""
    from rich.console import Console

    from toolkit import load_recipe, run_recipe

    recipe_of = load_recipe(RECIPES / recipe, [*overrides, f"training.output_dir={folder}"])
    return run_recipe(recipe_of, console=Console(stderr=True, quiet=False))


def write_pairs(run: Any, folder: Path, rows: int) -> None:
    """Pairs of the run's own answers to the first `rows` training prompts and to all held-out ones."""
    from toolkit import load_recipe, make_plan
    from toolkit.run.model import reopen

    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = reopen(make_plan(load_recipe(run.folder / "recipe.yaml"), for_training=False), run.adapter)
    model.eval()
    for split, most in (("train", rows), ("validation", None)):
        path = folder / f"pairs.{split}.jsonl"
        if path.is_file():
            continue
        lines = (RECIPES / "quickstart" / "data" / f"category.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        asked = [json.loads(line)["messages"] for line in lines[:most]]
        wrong = wrong_answers(model, tokenizer, [row[:1] for row in asked], [row[1]["content"] for row in asked])
        pairs = [
            {"prompt": row[:1], "chosen": row[1:2], "rejected": [{"role": "assistant", "content": other}]}
            for row, other in zip(asked, wrong, strict=True)
            if other is not None
        ]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def wrong_answers(model: Any, tokenizer: Any, prompts: Sequence[Any], right: Sequence[str]) -> list[str | None]:
    """Of each prompt the first wrong category among a few answers that the model samples at temperature 1."""
    from transformers import set_seed

    from toolkit.evaluate.generate import answer

    set_seed(0)
    known = set(right)
    ids = [list(tokenizer.apply_chat_template(each, add_generation_prompt=True)["input_ids"]) for each in prompts]
    found: list[str | None] = [None] * len(ids)
    for _ in range(_TRIES):
        left = [number for number, each in enumerate(found) if each is None]
        asked = [ids[number] for number in left]
        given = answer(model, tokenizer, asked, max_new_tokens=6, batch_size=100, temperature=1.0)
        for number, text in zip(left, given, strict=True):
            found[number] = text if text in known and text != right[number] else None
    return found


def judged(run: Any, pairs: Path) -> dict[str, float]:
    """The run's adapter on the held-out pairs, and its exact match on all held-out prompts of the quickstart."""
    from toolkit import load_recipe, make_plan
    from toolkit.evaluate import score_now
    from toolkit.evaluate.preferences import answer_figures, answer_logps
    from toolkit.run.data import build_batches
    from toolkit.run.model import reopen

    pairs_recipe = load_recipe(RECIPES / "quickstart-dpo.yaml", [f"data.train={pairs}", f"data.validation={pairs}"])
    plan, whole = (
        make_plan(each, for_training=False) for each in (pairs_recipe, load_recipe(RECIPES / "quickstart.yaml"))
    )
    model, tokenizer = reopen(plan, run.adapter)
    model.eval()
    table, asked = (build_batches(tokenizer, each) for each in (plan, whole))
    assert table.validation is not None
    figures = answer_figures(answer_logps(model, table.validation, 100), table.validation)
    exact = score_now(model, tokenizer, asked.held_out, metric="exact_match", max_new_tokens=8, batch_size=100)
    return {"preference_accuracy": figures["preference_accuracy"], **exact}


def tell(seed: int, method: str, figures: Mapping[str, float], rewards: Mapping[str, float]) -> None:
    """One line of the table."""
    right = f"{rewards['rewards/accuracies']:.1%}" if rewards else "-"
    print(
        f"seed {seed}  {method:8} right answer more probable {figures['preference_accuracy']:.1%}, rewarded the right "
        f"way round {right}, exact match {figures['exact_match']:.1%}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the runs that start from it")
    parser.add_argument("--methods", nargs="+", default=["dpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rows", type=int, default=6000, help="training prompts that the model answers")
    parser.add_argument("--name", default="")
    options = parser.parse_intermixed_args(arguments)
    for seed in options.seeds:
        place = options.folder / f"seed-{seed}"
        start = finished("quickstart.yaml", place / "sft", [f"training.seed={seed}"])
        write_pairs(start, place, options.rows)
        held = place / "pairs.validation.jsonl"
        tell(seed, "sft", judged(start, held), {})
        for method in options.methods:
            data = [f"data.train={place / 'pairs.train.jsonl'}", f"data.validation={held}"]
            run = finished(
                f"quickstart-{method}.yaml",
                place / f"{method}{options.name}",
                [*data, f"lora.adapter_name_or_path={start.adapter}", f"training.seed={seed}", *options.overrides],
            )
            tell(seed, method + options.name, judged(run, held), run.summary["results"].get("preference", {}))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
