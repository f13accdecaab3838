#!/usr/bin/env python3
"""Peak anonymous memory of a run over more rows than anyone would hold: reading, tokenising, packing and one step.

    .venv/bin/python scripts/benchmarks/data_memory.py FOLDER [--rows 1000000] [KEY=VALUE …]

Writes FOLDER/rows-N.jsonl once, the quickstart's questions with a number each, and gives it to `onecard train` with two
steps and no evaluation; further arguments change its recipe. Before each line of the run it prints seconds and the peak
until then, and at the end what the temporary files took.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from turns import most_anonymous

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
SEED_ROWS = ROOT / "recipes" / "quickstart" / "data" / "category.train.jsonl"
MIB = 1 << 20


def write_rows(path: Path, count: int) -> None:
    """`count` different rows; a file of that name is taken to hold them."""
    if path.exists():
        return
    rows = [json.loads(line) for line in SEED_ROWS.read_text(encoding="utf-8").splitlines()]
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as out:
        out.writelines(_numbered(itertools.cycle(rows), count))
    part.rename(path)


def _numbered(rows: Iterator[dict[str, list[dict[str, str]]]], count: int) -> Iterator[str]:
    for number, row in enumerate(itertools.islice(rows, count)):
        question, *others = row["messages"]
        numbered = {**question, "content": f"{question['content']} ({number})"}
        yield json.dumps({"messages": [numbered, *others]}) + "\n"


def run(data: Path, output: Path, overrides: list[str]) -> int:
    """Train two steps; print each line of the run with the seconds and the peak until then. Returns the exit code."""
    settings = [f"data.train={data}", "data.validation=null", f"training.output_dir={output}", "training.max_steps=2"]
    command = [sys.executable, "-m", "toolkit", "train", str(RECIPE), *settings, *overrides]
    begun = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        assert child.stdout is not None
        with most_anonymous(child.pid) as most:
            for line in child.stdout:
                if text := line.rstrip():
                    print(f"{time.monotonic() - begun:8.1f} s {most[0] / MIB:8.0f} MiB  {text}", flush=True)
            child.wait()
        print(f"{time.monotonic() - begun:8.1f} s {most[0] / MIB:8.0f} MiB  ended", flush=True)
    return child.returncode


def main() -> int:
    """Write the rows and train on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the rows are written")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    data = arguments.folder.resolve() / f"rows-{arguments.rows}.jsonl"
    write_rows(data, arguments.rows)
    with tempfile.TemporaryDirectory() as output:
        return run(data, Path(output) / "run", arguments.overrides)


if __name__ == "__main__":
    sys.exit(main())
