#!/usr/bin/env python3
"""Make the chat examples under recipes/quickstart/data: `category` and `define` from WordNet, `dialog` from a corpus.

A split by group, not `datasets.train_test_split`: a word with several senses, or a dialogue told twice, never stands on
both sides. Nothing depends on a random state of the machine: the same input gives the same bytes.

The input, on Debian or Ubuntu (nothing is installed):

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    pip download --no-deps chatterbot-corpus==1.3.3 && unzip -q chatterbot_corpus-*.whl -d chatterbot

    python scripts/make_quickstart_data.py data --wordnet wordnet/usr/share/wordnet \
        --dialogs chatterbot/chatterbot_corpus/data/english
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML

__all__ = ["Example", "dialogs", "main", "split", "wordnet"]

# WordNet's lexicographer files of nouns (lexnames(5WN)); 03, "Tops", holds the few words above them all.
CATEGORIES = {
    4: "act",
    5: "animal",
    6: "artifact",
    7: "attribute",
    8: "body",
    9: "cognition",
    10: "communication",
    11: "event",
    12: "feeling",
    13: "food",
    14: "group",
    15: "location",
    16: "motive",
    17: "object",
    18: "person",
    19: "phenomenon",
    20: "plant",
    21: "possession",
    22: "process",
    23: "quantity",
    24: "relation",
    25: "shape",
    26: "state",
    27: "substance",
    28: "time",
}
HELD_OUT_PERCENT = 8


class Example(NamedTuple):
    """One conversation, its turns alternately user and assistant; `group` decides the side of the split."""

    task: str
    group: str
    turns: tuple[str, ...]
    key: str

    def to_json(self) -> str:
        """The row as it is written, with a name that follows from its content."""
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(self.turns)]
        name = f"{self.task}-{hashlib.sha1(self.key.encode()).hexdigest()[:10]}"
        return json.dumps({"messages": messages, "task": self.task, "id": name}, ensure_ascii=False)


def wordnet(folder: Path) -> tuple[list[Example], list[Example]]:
    """The `category` and the `define` examples of `folder/data.noun` (format: wndb(5WN))."""
    category, define = [], []
    for line in (folder / "data.noun").read_text(encoding="ascii").splitlines():
        if line.startswith(" ") or " | " not in line:  # the licence opens the file, each line indented
            continue
        head, gloss = line.rstrip().split(" | ", 1)
        fields = head.split()
        kind, word = int(fields[1]), fields[4].replace("_", " ")
        gloss = gloss.split('; "')[0].strip().rstrip(";")  # without the example sentences
        if kind not in CATEGORIES or not 12 <= len(gloss) <= 160:
            continue
        question = f"Which category is it: {word} - {gloss}?"
        category.append(Example("category", word, (question, CATEGORIES[kind]), word + gloss))
        if word.isalpha() and word.islower():
            define.append(Example("define", word, (f'Define the noun "{word}".', gloss), word + gloss))
    return category, define


def dialogs(folder: Path) -> Iterator[Example]:
    """The conversations of every YAML file in `folder`, cut so that the assistant has the last word."""
    for file in sorted(folder.glob("*.yml")):
        for conversation in YAML(typ="safe").load(file.read_text(encoding="utf-8"))["conversations"]:
            turns = [str(turn).strip() for turn in conversation]
            turns = turns[: len(turns) // 2 * 2]
            if turns and all(turns):
                yield Example("dialog", turns[0], tuple(turns), "".join(turns))


def split(examples: Iterable[Example], train: int, validation: int) -> tuple[list[Example], list[Example]]:
    """At most `train` and `validation` examples, no group in both, no first question twice."""
    unique: dict[str, Example] = {}
    for example in examples:
        unique.setdefault(example.turns[0].lower(), example)
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in unique.values():
        sides[_is_held_out(example.group)].append(example)
    order = random.Random(0)
    for side in sides:
        order.shuffle(side)
    return sides[0][:train], sides[1][:validation]


def _is_held_out(group: str) -> bool:
    digest = hashlib.sha1(f"split{group.lower()}".encode()).hexdigest()
    return int(digest, 16) % 100 < HELD_OUT_PERCENT


def _write(out: Path, examples: Iterable[Example], train: int, validation: int) -> None:
    for name, side in zip(("train", "validation"), split(examples, train, validation), strict=True):
        file = out / f"{side[0].task}.{name}.jsonl"
        file.write_text("".join(example.to_json() + "\n" for example in side), encoding="utf-8")
        print(f"{file}: {len(side)} examples")


def main(arguments: list[str] | None = None) -> int:
    """Write the six files; 0 done, 2 where the input is missing or the output folder is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder that holds data.noun")
    parser.add_argument("--dialogs", type=Path, required=True, help="folder of chatterbot-corpus YAML files")
    given = parser.parse_args(arguments)
    if given.out.exists():
        print(f"{given.out}: already exists; name a new folder", file=sys.stderr)
        return 2
    try:
        category, define = wordnet(given.wordnet)
        talk = list(dialogs(given.dialogs))
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; see --help for where the input comes from", file=sys.stderr)
        return 2
    if not talk:
        print(f"{given.dialogs}: holds no .yml files; see --help for where the input comes from", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True)
    _write(given.out, category, 6000, 500)
    _write(given.out, define, 4000, 400)
    _write(given.out, talk, 4000, 200)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
