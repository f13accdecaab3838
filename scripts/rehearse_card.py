#!/usr/bin/env python3
"""A published recipe at its real size on a rehearsed card: loads, trains a few steps, evaluates, is packaged, or not.

    .venv/bin/python scripts/rehearse_card.py recipes/olmoe-1b-7b.yaml --device rtx-3060 [--steps 2] [KEY=VALUE …]

No card is needed: PyTorch's CUDA build runs over a stand-in for CUDA's runtime (docs/cards.md), whose memory is counted
and not filled. The checkpoint is a file with holes, made from the model's published config; the data are the
quickstart's. Values are not computed, so losses mean nothing. `--until attach` ends before the first step, `--until
train` after the last. `--races` looks for races between streams, `--values` computes everything (for small models).
Needs 4 GB in .venv-card, which are fetched the first time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.card.machine import Machine, Setting  # noqa: E402
from toolkit.errors import OnecardError  # noqa: E402
from toolkit.plan.cards import Card  # noqa: E402
from toolkit.plan.devices import choose_device  # noqa: E402
from toolkit.plan.shapes import published  # noqa: E402

QUICKSTART = ROOT / "recipes" / "quickstart"
LARGEST_COPY = 1 << 20
FEWEST = 32
"""Tokens that an example of the quickstart has at least."""
ATTACHED = ("experts", "linears", "other", "adapter")
"""What of a plan is on the card before the first step; slots are made in it."""
HEAD = (
    "recipe", "card", "ends with", "steps", "plan MiB", "after load", "load peak", "step peak", "reserved", "races",
    "waits a step", "launches a step", "MB to the card a step", "MB back a step",
)  # fmt: skip


def setting(card: Card, values: bool, races: bool, until: str | None) -> Setting:
    """Of the card that is rehearsed; its driver takes what a desktop's does not use."""
    name = card.name.upper().replace("RTX-", "NVIDIA GeForce RTX ").replace("-TI", " Ti").replace("-SUPER", " SUPER")
    major, minor = card.capability
    return Setting(
        memory=card.memory,
        sm=10 * major + minor,
        multiprocessors=card.multiprocessors,
        name=name.partition("-")[0],
        largest_copy=None if values else LARGEST_COPY,
        sizes=None if values else 1,
        races=1 if races else None,
        until=until,
    )


def prepared(recipe: Path, machine: Machine, folder: Path) -> Path:
    """The recipe with a checkpoint of its size and data that are here."""
    yaml = YAML(typ="safe")
    sections: dict[str, Any] = yaml.load(recipe.read_text(encoding="utf-8"))
    model = sections["model"]["model_name_or_path"]
    if model in published():
        program = (
            "import sys; from pathlib import Path; from tests.card.checkpoints import hollow_checkpoint as write; "
        )
        done = machine.python("-c", f"{program}write(sys.argv[1], Path(sys.argv[2]))", model, folder / "model")
        if done.returncode:
            raise SystemExit(f"the checkpoint of {model} could not be made: {done.stderr.strip().splitlines()[-1]}")
        sections["model"]["model_name_or_path"] = str(folder / "model")
    else:
        sections["model"]["model_name_or_path"] = str((recipe.parent / model).resolve())
    rows = {split: str(QUICKSTART / "data" / f"category.{split}.jsonl") for split in ("train", "validation")}
    training = sections["training"]
    if training.get("packing", True):
        sections["data"] = {**rows, "truncation": sections["data"].get("truncation", "drop")}
    else:  # examples that are as long by themselves as packed ones are together
        train = lengthened(rows["train"], training["max_length"] // FEWEST, folder)
        sections["data"] = {**rows, "train": str(train), "truncation": "keep_start"}
    written = folder / "recipe.yaml"
    with written.open("w", encoding="utf-8") as file:
        yaml.dump(sections, file)
    return written


def lengthened(rows: str, count: int, folder: Path) -> Path:
    """Conversations that go through so many of these examples, one after another."""
    turns = [json.loads(line)["messages"] for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    starts = range(0, len(turns) - count, count)
    conversations = (list(chain.from_iterable(turns[first : first + count])) for first in starts)
    written = folder / "train.jsonl"
    written.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations), encoding="utf-8")
    return written


def overrides(folder: Path, steps: int, given: list[str]) -> list[str]:
    """So many steps, a look at few held-out examples, and what the user says."""
    few = {"eval.max_samples": 8, "eval.max_new_tokens": 3, "eval.num_samples": 0, "data.max_samples": 4000}
    ours = {"training.output_dir": folder / "run", "training.max_steps": steps, "training.logging_steps": 1, **few}
    said = {each.partition("=")[0] for each in given}
    return [*(f"{name}={value}" for name, value in ours.items() if name not in said), *given]


def row(recipe: Path, card: str, outcome: Any, report: dict[str, Any], plan: dict[str, Any] | None) -> dict[str, Any]:
    """One line of the table; bytes. Of what is planned, what torch allocates."""
    parts: dict[str, dict[str, Any]] = {}
    for part in report.get("parts", []):
        parts.setdefault(part["part"], part)
    steps, load = report.get("steps", []), parts.get("load", {})
    last = steps[-1] if steps else {}
    error = outcome.err.strip().splitlines()[-1] if outcome.code and outcome.err.strip() else ""
    return {
        "recipe": recipe.stem,
        "card": card,
        "code": outcome.code,
        "error": error,
        "steps": len(steps),
        **(plan_of(plan) if plan else dict.fromkeys(("planned", "planned_attached", "streamed"))),
        "after_load": load.get("allocated"),
        "attached": parts.get("attach", {}).get("allocated"),
        "load_peak": load.get("allocated_peak"),
        "probe_peak": parts.get("before step 1", {}).get("allocated_peak"),
        "step_peak": max(
            (part["allocated_peak"] for name, part in parts.items() if name.startswith("step ")), default=None
        ),
        "reserved_peak": max((part["reserved_peak"] for part in report.get("parts", [])), default=None),
        "races": None if report.get("races") is None else sum(report["races"].values()),
        "waits": last.get("synchronizations"),
        "launches": last.get("launches"),
        "bytes_to_device": last.get("bytes_to_device"),
        "bytes_to_host": last.get("bytes_to_host"),
    }


def plan_of(plan: dict[str, Any]) -> dict[str, Any]:
    """What torch is to allocate at the peak, and of that before the first step; how many layers are streamed."""
    held = plan["bytes"]
    return {
        "planned": held["total"] - held["libraries"],
        "planned_attached": sum(held[name] for name in ATTACHED),
        "streamed": f"{plan['streamed_layers']} of {plan['moe_layers']}",
    }


def line(found: dict[str, Any]) -> str:
    """The row as a table has it."""

    def size(key: str, unit: float = 2**20) -> str:
        return "" if found[key] is None else f"{found[key] / unit:,.0f}"

    cells = [
        found["recipe"], found["card"], str(found["code"]), str(found["steps"]),
        *(size(key) for key in ("planned", "after_load", "load_peak", "step_peak", "reserved_peak")),
        *("" if found[key] is None else f"{found[key]:,}" for key in ("races", "waits", "launches")),
        *(size(key, 1e6) for key in ("bytes_to_device", "bytes_to_host")),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Rehearse, and print a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--device", default="rtx-3060", help="a card that `onecard plan --device` knows")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--until", choices=("load", "attach", "train"), help="end after this part of the job")
    parser.add_argument(
        "--other", type=float, default=0.0, metavar="GIB", help="taken by other programs, say a desktop"
    )
    parser.add_argument("--races", action="store_true", help="look for races between streams")
    parser.add_argument("--values", action="store_true", help="compute every number")
    parser.add_argument("--keep", type=Path, help="a folder for the run's files and what it printed")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_intermixed_args()
    if subprocess.run(["bash", str(ROOT / "scripts" / "setup_card.sh")], check=False).returncode:
        return 5
    try:
        card = choose_device(given.device).card
    except OnecardError as error:
        parser.error(str(error))
    if card is None:
        parser.error(f"--device: {given.device} is no card")
    with tempfile.TemporaryDirectory(prefix="rehearsed-") as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for made in ("run", "model"):
            shutil.rmtree(folder / made, ignore_errors=True)
        machine = Machine(folder, setting(card, given.values, given.races, given.until))
        machine = machine.with_card(other=int(given.other * 2**30))
        began = time.perf_counter()
        recipe = prepared(given.recipe.resolve(), machine, folder)
        outcome = machine.onecard("train", recipe, *overrides(folder, given.steps, given.overrides), timeout=7200)
        (folder / "printed.txt").write_text(outcome.out + outcome.err, encoding="utf-8")
        plan = folder / "run" / "plan.json"
        made = json.loads(plan.read_text(encoding="utf-8")) if plan.is_file() else None
        found = row(given.recipe, given.device, outcome, dict(outcome.report), made)
        found["seconds"] = round(time.perf_counter() - began)
        found["report"] = dict(outcome.report)
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}\n{line(found)}")
        if found["error"]:
            print(found["error"])
    return int(outcome.code)


if __name__ == "__main__":
    sys.exit(main())
