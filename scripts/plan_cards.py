#!/usr/bin/env python3
"""The recipes of this repository planned for every card that `onecard plan --device` knows, as a markdown table.

    .venv/bin/python scripts/plan_cards.py [--recipes NAME …] [--cards NAME …] [--seconds]

Offline, from what comes with the package. Seconds are a step's limit and estimate. `--seconds` adds a column:
it times the whole command, interpreter and imports included, once for each card; the median and the longest.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from toolkit.offload.place import streamed
from toolkit.plan import choose_device, make_plan
from toolkit.plan.cards import CARDS
from toolkit.recipe import load

ROOT = Path(__file__).parents[1]
RECIPES = ("olmoe-1b-7b", "qwen1.5-moe-a2.7b", "deepseek-v2-lite", "gpt-oss-20b", "qwen3-30b-a3b")


def cell(name: str, card: str) -> tuple[str, float]:
    """What the plan says for a card, and its need in GiB."""
    recipe = load(ROOT / "recipes" / f"{name}.yaml", note=lambda _: None)
    made = make_plan(recipe, device=choose_device(card))
    need, away = made.bytes.total / 2**30, len(streamed(made.placement))
    if not made.fits:
        return (f"no: {made.changes[0].what}" if made.changes else "no"), need
    seconds = f", {made.duration.limit:.1f} to {made.duration.estimate:.1f} s" if made.duration else ""
    return (f"{away} of {len(made.placement)} layers streamed, {need:.1f}" if away else "fits") + seconds, need


def wall(name: str, cards: list[str]) -> str:
    """Median and longest wall time of the command over these cards."""
    times = []
    for card in cards:
        began = time.perf_counter()
        command = [sys.executable, "-m", "toolkit", "plan", f"recipes/{name}.yaml", "--device", card, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        assert done.returncode in (0, 5), done.stderr
        times.append(time.perf_counter() - began)
    return f"{statistics.median(times):.2f} ({max(times):.2f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, metavar="NAME")
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS), metavar="NAME")
    parser.add_argument("--seconds", action="store_true", help="time the whole command")
    given = parser.parse_args()
    timed, cards = given.seconds, given.cards
    sizes = sorted({CARDS[name].size for name in cards})
    groups = {size: [name for name in cards if CARDS[name].size == size] for size in sizes}
    heads = [f"{size} GB: {' '.join(name.removeprefix('rtx-') for name in groups[size])}" for size in sizes]
    print("| recipe | need GiB | " + " | ".join(heads) + (" | plan, s |" if timed else " |"))
    print("|---" * (len(sizes) + 2 + timed) + "|")
    for name in given.recipes:
        cells = [cell(name, min(groups[size], key=lambda each: CARDS[each].memory)) for size in sizes]
        row = [name, f"{cells[-1][1]:.1f}", *(text for text, _ in cells), *([wall(name, cards)] if timed else [])]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
