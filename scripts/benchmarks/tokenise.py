#!/usr/bin/env python3
"""Rows a second that one core reads, checks, renders and tokenises, of the embedded data sets or of files of yours.

    .venv/bin/python scripts/benchmarks/tokenise.py [FILE …] [--model MODEL] [--repeats 3]

Processor time of the whole data step, the best of some repeats; a file is JSONL or Parquet, as `data.train` takes it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from transformers import AutoTokenizer

from toolkit.data import build_batches

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"
LENGTH = 4096


def main() -> None:
    """Print a line a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--model", default=str(QUICKSTART / "nano-qwen3moe-2m"), help="whose tokenizer and template")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    for path in given.files or sorted((QUICKSTART / "data").glob("*.train.jsonl")):
        seconds = []
        for _ in range(given.repeats):
            begun = time.process_time()
            report = build_batches(tokenizer, train=str(path.resolve()), max_length=LENGTH).report
            seconds.append(time.process_time() - begun)
        rows = report.splits["train"].rows
        print(f"{path.name}: {rows} rows, {min(seconds):.2f} s, {rows / min(seconds):,.0f} rows/s", flush=True)


if __name__ == "__main__":
    main()
