#!/usr/bin/env python3
"""The recipes of this repository planned for every card that `onecard plan --device` knows, as a markdown table.

    .venv/bin/python scripts/plan_cards.py [--seconds]

Offline, from the published configs that come with the package. A step is rehearsed once a recipe: its bytes do not
depend on the card. `--seconds` times each recipe's plan, without the imports, which are printed first.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPES = ("olmoe-1b-7b", "qwen1.5-moe-a2.7b", "deepseek-v2-lite", "gpt-oss-20b", "qwen3-30b-a3b")


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    from toolkit.plan import Device, make_plan
    from toolkit.plan.cards import CARDS
    from toolkit.plan.place import streamed
    from toolkit.recipe import load

    if "--seconds" in sys.argv:
        print(f"imports: {time.perf_counter() - began:.1f} s")
    sizes = sorted({card.memory_gib for card in CARDS.values()})
    names = {size: " ".join(n.removeprefix("rtx-") for n, c in CARDS.items() if c.memory_gib == size) for size in sizes}
    print("| recipe | need GiB | " + " | ".join(f"{size} GiB: {names[size]}" for size in sizes) + " |")
    print("|---" * (len(sizes) + 2) + "|")
    for name in RECIPES:
        recipe, cells, need = load(ROOT / "recipes" / f"{name}.yaml", note=lambda _: None), [], 0.0
        began = time.perf_counter()
        for size in reversed(sizes):
            card = next(card for card in CARDS.values() if card.memory_gib == size)
            made = make_plan(recipe, device=Device("cuda", card.name, card.memory, card))
            away = len(streamed(made.placement))
            need = need or made.bytes.total / 2**30
            if not made.fits:
                cells.append(f"no: {made.changes[0].what}" if made.changes else "no")
            elif away:
                cells.append(f"{away} of {len(made.placement)} layers streamed, {made.bytes.total / 2**30:.1f}")
            else:
                cells.append("fits")
        shown = f" ({time.perf_counter() - began:.1f} s)" if "--seconds" in sys.argv else ""
        print(f"| {name}{shown} | {need:.1f} | {' | '.join(reversed(cells))} |", flush=True)


if __name__ == "__main__":
    main()
