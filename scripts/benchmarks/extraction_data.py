#!/usr/bin/env python3
"""An extraction task out of the quickstart's categories: a dictionary's line in, one JSON object out.

    .venv/bin/python scripts/benchmarks/extraction_data.py FOLDER

Writes `extraction.train.jsonl` and `extraction.validation.jsonl`, the nouns split as they are there. Fine-tuning for
structured answers is what drafts help most: of an object the keys are sure and the values are not.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["main", "rows"]

DATA = Path(__file__).resolve().parents[2] / "recipes/quickstart/data"
LONGEST = 90
"""Characters of a line; longer ones are left out."""


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Conversations of one split."""
    for line in (DATA / f"category.{split}.jsonl").read_text(encoding="utf-8").splitlines():
        asked, answered = json.loads(line)["messages"]
        found = re.fullmatch(r"Which category is it: (.+?) - (.+)\?", asked["content"])
        if found is None or len(found[0]) > LONGEST:
            continue
        item = json.dumps({"noun": found[1], "category": answered["content"]}, ensure_ascii=False)
        asked["content"] = f"{found[1]} - {found[2]}"
        yield {"messages": [asked, {"role": "assistant", "content": item}]}


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split)]
        (given.folder / f"extraction.{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{given.folder}/extraction.{split}.jsonl: {len(lines)} examples")


if __name__ == "__main__":
    main()
