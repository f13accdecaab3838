#!/usr/bin/env python3
"""The recipes of published models planned for every card that `onecard plan --device` knows, as a markdown table.

    .venv/bin/python scripts/plan_cards.py [--recipes NAME …] [--cards NAME …] [--set KEY=VALUE …] [--seconds]

Offline, from what comes with the package. Seconds are a step's limit and estimate. `--set` overrides each recipe.
`--seconds` adds a column: it times the whole command, interpreter and imports included, once for each card; the median
and the longest.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from toolkit.offload.place import streamed
from toolkit.plan import choose_device, make_plan
from toolkit.plan.cards import CARDS
from toolkit.plan.shapes import published, stated_billions
from toolkit.recipe import Recipe, load

ROOT = Path(__file__).parents[1]


def recipes() -> list[str]:
    """For each published model the recipe that is named for it, small models first."""
    models = {path.stem: read(path.stem).model.model_name_or_path for path in (ROOT / "recipes").glob("*.yaml")}
    models = {name: model for name, model in models.items() if model in published() and name in model.lower()}
    assert len(models) == len(published()), "a published model without a recipe"
    return sorted(models, key=lambda name: stated_billions(models[name]))


def read(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of this repository."""
    return load(ROOT / "recipes" / f"{name}.yaml", overrides, note=lambda _: None)


def cell(name: str, card: str, overrides: Sequence[str]) -> tuple[str, float]:
    """What the plan says for a card, and its need in GiB."""
    made = make_plan(read(name, overrides), device=choose_device(card))
    need, away = made.bytes.total / 2**30, len(streamed(made.placement))
    if not made.fits:
        return (f"no: {made.changes[0].what}" if made.changes else "no"), need
    seconds = f", {made.duration.limit:.1f} to {made.duration.estimate:.1f} s" if made.duration else ""
    return (f"{away} of {len(made.placement)} layers streamed, {need:.1f}" if away else "fits") + seconds, need


def wall(name: str, cards: list[str], overrides: Sequence[str]) -> str:
    """Median and longest wall time of the command over these cards."""
    times = []
    for card in cards:
        began = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "toolkit",
            "plan",
            f"recipes/{name}.yaml",
            *overrides,
            "--device",
            card,
            "--json",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        assert done.returncode in (0, 5), done.stderr
        times.append(time.perf_counter() - began)
    return f"{statistics.median(times):.2f} ({max(times):.2f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=recipes(), default=recipes(), metavar="NAME")
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS), metavar="NAME")
    parser.add_argument("--seconds", action="store_true", help="time the whole command")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    given = parser.parse_args()
    timed, cards, overrides = given.seconds, given.cards, given.overrides
    sizes = sorted({CARDS[name].size for name in cards})
    groups = {size: [name for name in cards if CARDS[name].size == size] for size in sizes}
    heads = [f"{size} GB: {' '.join(name.removeprefix('rtx-') for name in groups[size])}" for size in sizes]
    print("| recipe | need GiB | " + " | ".join(heads) + (" | plan, s |" if timed else " |"))
    print("|---" * (len(sizes) + 2 + timed) + "|")
    for name in given.recipes:
        cells = [cell(name, min(groups[size], key=lambda each: CARDS[each].memory), overrides) for size in sizes]
        row = [
            name,
            f"{cells[-1][1]:.1f}",
            *(text for text, _ in cells),
            *([wall(name, cards, overrides)] if timed else []),
        ]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
