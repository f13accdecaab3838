#!/usr/bin/env python3
"""Category rows as preference pairs: the right category is chosen, another one is rejected. Made of the rows beside it.

.venv/bin/python scripts/make_quickstart_pairs.py [FOLDER]

The wrong category is that of another row of the split, drawn with a seed, so that each category is rejected about as
often as it is chosen: which of the two is the commoner one says nothing about which is right.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["COUNTS", "DATA", "lines"]

DATA = Path(__file__).resolve().parents[1] / "recipes" / "quickstart" / "data"
COUNTS = {"train": 2000, "validation": 250}
_SEED = 22


def lines(split: str) -> Iterator[str]:
    """Pairs of the first rows of a split, as JSON."""
    text = (DATA / f"category.{split}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line)["messages"] for line in text.splitlines()]
    answers = [answer["content"] for _, answer in rows]
    drawn = random.Random(_SEED)
    for asked, answer in rows[: COUNTS[split]]:
        wrong = answer["content"]
        while wrong == answer["content"]:
            wrong = drawn.choice(answers)
        pair = {"prompt": [asked], "chosen": [answer], "rejected": [{**answer, "content": wrong}]}
        yield json.dumps(pair, ensure_ascii=False)


def main() -> None:
    """Write both splits."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    for split in COUNTS:
        (folder / f"pairs.{split}.jsonl").write_text("\n".join(lines(split)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
