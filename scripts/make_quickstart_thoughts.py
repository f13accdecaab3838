#!/usr/bin/env python3
"""Category rows with a thought: what the gloss says that the noun is, before the category. Made of the rows beside it.

.venv/bin/python scripts/make_quickstart_thoughts.py [FOLDER]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

__all__ = ["COUNTS", "DATA", "lines"]

DATA = Path(__file__).resolve().parents[1] / "recipes" / "quickstart" / "data"
COUNTS = {"train": 800, "validation": 60}
_ASKED = re.compile(r"Which category is it: (?P<noun>.+?) - (?P<gloss>[^;:(,]{8,48})[;:(,?]")


def lines(split: str) -> Iterator[str]:
    """The first rows of a split whose gloss begins with a short clause, as JSON."""
    return islice(_thoughtful((DATA / f"category.{split}.jsonl").read_text(encoding="utf-8")), COUNTS[split])


def _thoughtful(text: str) -> Iterator[str]:
    for row in map(json.loads, text.splitlines()):
        asked, answer = row["messages"]
        if found := _ASKED.match(asked["content"]):
            thought = f"It is {found['gloss'].strip()}."
            yield json.dumps({"messages": [asked, {**answer, "reasoning_content": thought}]}, ensure_ascii=False)


def main() -> None:
    """Write both splits."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    for split in COUNTS:
        (folder / f"thoughts.{split}.jsonl").write_text("\n".join(lines(split)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
