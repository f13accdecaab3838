#!/usr/bin/env python3
"""The first ten minutes, timed: init, plan, train, report, generate and push, each as a command of its own.

    .venv/bin/python scripts/ten_minutes.py [FOLDER] [section.key=value ...] [--json]

Offline: the model and data of the repository, and the Hub that the tests run on this machine's loopback address. What
is made stays in FOLDER (a new one under runs/ if none is given); overrides go to the training. Ends with exit code 1,
and the command's own words, where a step fails or what the Hub got is not what was trained.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.harness.hub_stand_in import HubStandIn, serve  # noqa: E402

QUICKSTART = ROOT / "recipes" / "quickstart"
DATA = QUICKSTART / "data" / "category.train.jsonl"
PROMPT = "Which category is it: oak - a tree?"
REPOSITORY = "alice/my-first-adapter"
SETTINGS = ("training.learning_rate=3e-3", "training.per_device_train_batch_size=4", "training.max_length=256",
            "training.gradient_checkpointing=false", "eval.max_new_tokens=8", "eval.batch_size=100")  # fmt: skip
"""What a model of 2 M parameters wants otherwise than one of 7 B."""


def main() -> None:
    """Run the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where recipe and run go; must not exist")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--json", action="store_true", help="the table for programs")
    given = parser.parse_args()
    folder, overrides = given.folder, given.overrides
    if folder and "=" in str(folder):
        folder, overrides = None, [str(folder), *overrides]
    if folder is None:
        (ROOT / "runs").mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="ten-minutes-", dir=ROOT / "runs"))
    folder.mkdir(parents=True, exist_ok=True)
    with serve() as hub:
        took = walk(folder.resolve(), overrides, hub, onecard)
    print(json.dumps(took, indent=2) if given.json else table(took))


Command = Callable[[HubStandIn, Path, str, list[str]], float]


def walk(folder: Path, overrides: list[str], hub: HubStandIn, run_verb: Command) -> dict[str, float]:
    """Seconds by step, each taken by `run_verb`."""
    recipe, run = folder / "recipe.yaml", folder / "run"
    settings = [*SETTINGS, f"training.output_dir={run}", *overrides]
    steps: dict[str, list[Any]] = {
        "init": [recipe, "--model", QUICKSTART / "nano-qwen3moe-2m", "--data", DATA],
        "plan": [recipe, *settings],
        "train": [recipe, *settings],
        "report": [run],
        "generate": [run, "--prompt", PROMPT, "--max-new-tokens", 8],
        "push": [run, REPOSITORY],
    }
    took = {verb: run_verb(hub, folder, verb, list(map(str, given))) for verb, given in steps.items()}
    check(run, hub)
    return took


def onecard(hub: HubStandIn, folder: Path, verb: str, arguments: list[str]) -> float:
    """Seconds that a verb took; its words go to a file beside the run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "good", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HOME": str(folder / "hub"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "toolkit", verb, *arguments]
    print(f"onecard {verb} …", file=sys.stderr, flush=True)
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    (folder / f"{verb}.txt").write_text(done.stderr + done.stdout, encoding="utf-8")
    if done.returncode:
        sys.exit(f"onecard {verb}: exit code {done.returncode}\n{done.stderr}")
    return seconds


def check(run: Path, hub: HubStandIn) -> None:
    """Stop unless page and adapter are there, and the Hub has the adapter's very bytes in one private commit."""
    pushed = {name: content for commit in hub.commits for name, content in commit["files"].items()}
    trained = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    for right, what in (
        ((run / "report.html").is_file(), "there is no page"),
        (len(hub.commits) == 1 and hub.repositories[REPOSITORY]["private"], "not one private commit"),
        (pushed == trained, "the Hub has other bytes than were trained"),
    ):
        if not right:
            sys.exit(f"ten_minutes: {what}")


def table(took: dict[str, float]) -> str:
    """Markdown."""
    rows = [f"| `onecard {verb}` | {seconds:.1f} |" for verb, seconds in took.items()]
    return "\n".join(["| step | seconds |", "|---|---|", *rows, f"| in all | {sum(took.values()):.1f} |"])


if __name__ == "__main__":
    main()
