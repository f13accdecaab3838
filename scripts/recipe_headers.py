#!/usr/bin/env python3
"""Write into the first lines of each recipe for a card what is planned for it: card, memory, time of a step.

    .venv/bin/python scripts/recipe_headers.py [RECIPE ...]

Offline, from the published configs that come with the package. What stands above the line that begins with `# Fits` is
left as it is; that line and those after it, up to the recipe's first section, are written anew.
"""

from __future__ import annotations

import re
import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

from toolkit.offload.place import streamed
from toolkit.plan import Plan, choose_device, make_plan
from toolkit.plan.cards import CARDS, Card
from toolkit.recipe import Recipe, load

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
MARK = "# Fits a "
SMALLEST = 12
"""GiB of the smallest card that is spoken of."""
NAMED = 2
"""Cards of a size that are named."""


def recipes() -> list[Path]:
    """Those for a card: a model on the Hub."""
    return [path for path in sorted(RECIPES.glob("*.yaml")) if MARK in path.read_text(encoding="utf-8")]


def header(path: Path) -> str:
    """The comment lines that the plan gives."""
    recipe = load(path, note=lambda _: None)
    plans = {size: plan_for(recipe, cards) for size, cards in by_size().items()}
    first = first_size(plans)
    sentences = [
        f"Fits a {first} GB card ({named(first)}){with_streaming(plans[first])}.",
        planned(recipe, plans[first]),
    ]
    smaller = [size for size, made in plans.items() if size < first and made.fits and streamed(made.placement)]
    sentences += [f"Planned for {size} GB ({named(size)}){with_streaming(plans[size])}." for size in smaller[-1:]]
    return "\n".join(f"# {line}" for line in textwrap.wrap(" ".join(sentences), 116))


def first_size(plans: dict[int, Plan]) -> int:
    """GB of the smallest cards that hold the recipe whole, or else of the largest there are."""
    whole = [size for size, made in plans.items() if made.fits and not streamed(made.placement)]
    return min(whole, default=max(plans))


def by_size() -> dict[int, list[Card]]:
    """Cards by the GB they are sold with, small ones first; in each, as they are listed: slow ones first."""
    sizes = sorted({card.size for card in CARDS.values()})
    return {s: [c for c in CARDS.values() if c.size == s] for s in sizes if s >= SMALLEST}


def plan_for(recipe: Recipe, cards: list[Card]) -> Plan:
    """The plan on the first of them, with the memory of the one that has least."""
    return make_plan(recipe, device=replace(choose_device(cards[0].name), memory=min(card.memory for card in cards)))


def named(size: int) -> str:
    """`RTX 3090, RTX 4090`."""
    names = [re.sub(r"rtx|-\d+gb", "", card.name).replace("-", " ").title() for card in by_size()[size][:NAMED]]
    return ", ".join(f"RTX{name}" for name in names)


def with_streaming(made: Plan) -> str:
    """How much of the experts is streamed."""
    away = streamed(made.placement)
    return f" with the experts of {len(away)} of {len(made.placement)} layers streamed" if away else ""


def planned(recipe: Recipe, made: Plan) -> str:
    """Memory and time on the card that the plan is for."""
    training = recipe.training
    assert made.duration is not None
    sequences = training.per_device_train_batch_size * training.sides * training.gradient_accumulation_steps
    tokens = sequences * made.length
    hourly = 3600 / made.duration.estimate * tokens
    return (
        f"Planned for the first of them, not measured: {made.bytes.total / 2**30:.1f} GiB at the peak, of which "
        f"{made.bytes.experts / 2**30:.1f} are int8 experts; {made.duration.estimate:.1f} s per step of {tokens:,} "
        f"tokens, {hourly / 1e6:.1f} M tokens per hour."
    )


def written(path: Path) -> str:
    """The recipe with its header as planned."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(MARK))
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join([*lines[:start], header(path), *lines[end:]]) + "\n"


def main() -> None:
    """Rewrite what is given, or all."""
    warnings.simplefilter("ignore")
    for path in map(Path, sys.argv[1:]) if len(sys.argv) > 1 else recipes():
        path.write_text(written(path), encoding="utf-8")
        print(f"{path.name}: {next(line for line in path.read_text().splitlines() if line.startswith(MARK))[2:]}")


if __name__ == "__main__":
    main()
