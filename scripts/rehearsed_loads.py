#!/usr/bin/env python3
"""The recipes of published models loaded on the card that each names, rehearsed, beside its plans: a markdown table.

    .venv/bin/python scripts/rehearsed_loads.py [--recipes NAME …] [--newest PYTHON] [--keep FOLDER]

No card is needed (docs/cards.md). Each recipe is planned by this Python and by that of the newest supported stack, and
loaded at its real size with the adapter attached (scripts/rehearse_card.py --until attach), on the smallest card that
holds it whole, or else on the largest there is. Minutes each; with `--keep` a rerun does what is not there yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.plan_cards import read, recipes  # noqa: E402
from scripts.recipe_headers import by_size, first_size, plan_for  # noqa: E402

MOST = 1.05
"""Of the plan: what a load may reserve."""
HEAD = (
    "recipe", "card", "streamed", "plan, oldest", "plan, newest", "plan of what is attached", "attached", "load peak",
    "reserved",
)  # fmt: skip


def card_of(recipe: str) -> str:
    """The first card that the recipe's header names."""
    sizes = by_size()
    return sizes[first_size({size: plan_for(read(recipe), cards) for size, cards in sizes.items()})][0].name


def planned(python: str, recipe: str, card: str) -> int:
    """Bytes that torch allocates at a run's peak, as this interpreter's onecard plans them."""
    command = [python, "-m", "toolkit", "plan", f"recipes/{recipe}.yaml", "--device", card, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 5):
        raise SystemExit(f"{python}: no plan of {recipe}: {done.stderr.strip()}")
    held = json.loads(done.stdout)["bytes"]
    return int(held["total"] - held["libraries"])


def loaded(recipe: str, card: str, folder: Path) -> dict[str, Any]:
    """What the rehearsal found, now or before."""
    kept = folder / f"{recipe}.json"
    if not kept.is_file():
        words = ["--device", card, "--until", "attach", "--keep", str(folder / recipe), "--json"]
        command = [sys.executable, "scripts/rehearse_card.py", f"recipes/{recipe}.yaml", *words]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
        if not done.stdout:
            raise SystemExit(f"{recipe} on {card}: the rehearsal ended with exit code {done.returncode}")
        kept.write_bytes(done.stdout)
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    if found["code"]:
        raise SystemExit(f"{recipe} on {card}: {found['error']}")
    return found


def line(recipe: str, plans: list[int], found: dict[str, Any]) -> str:
    """The row as a table has it, sizes in MiB."""
    sizes = [*plans, *(found[key] for key in ("planned_attached", "attached", "load_peak", "reserved_peak"))]
    cells = [recipe, found["card"], found["streamed"], *(f"{size / 2**20:,.0f}" for size in sizes)]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the table; 1 where a load reserves more than the plan allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=recipes(), default=recipes(), metavar="NAME")
    parser.add_argument("--newest", default=str(ROOT / ".venv-newest" / "bin" / "python"), metavar="PYTHON")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    given, above = parser.parse_args(), 0
    if not Path(given.newest).is_file():
        parser.error(f"--newest: there is no {given.newest}; run bash scripts/setup.sh dev newest")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    with tempfile.TemporaryDirectory(prefix="loads-") as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for recipe in given.recipes:
            card = card_of(recipe)
            plans = [planned(python, recipe, card) for python in (sys.executable, given.newest)]
            found = loaded(recipe, card, folder)
            print(line(recipe, plans, found), flush=True)
            above += found["reserved_peak"] > MOST * found["planned"]
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
