"""Canaries: nothing secret, local or taken from the data may leave with an artifact; what is found is named.

`portable` cleans what it is given; this looks at the bytes that would really be sent, tensors' headers included. Secret
scanners know tokens, not which folders and rows are this user's.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from toolkit.data.problems import InvalidRow
from toolkit.data.sources import open_source
from toolkit.data.turns import as_turns
from toolkit.errors import DataError, ModelError
from toolkit.packaging.portable import SECRET
from toolkit.recipe import load

__all__ = ["canaries", "refuse_canaries", "training_answers"]

# Homes, temporary and mounted folders, with at least one name below them; a chat template has none of these.
_LOCAL = re.compile(r"(?<![\w./:-])(?:/(?:home|Users|root|tmp|mnt|media|scratch|workspace)/[\w.-]+|[A-Z]:\\\\?Users\\)")
_SHORTEST_ROW = 24
"""Characters from which on a text of the data is one that no template or card holds by chance."""

_OURS = ("tokenizer.json", "added_tokens.json")
"""The base's own vocabulary, in which any word may stand."""


def refuse_canaries(folder: Path, rows: Iterable[str] = ()) -> None:
    """Raise `ModelError` that names each token, local path and row of the data in an artifact's files.

    Args:
        rows: texts of the training data; short ones are not looked for.
    """
    if found := list(dict.fromkeys(canaries(folder, rows))):
        raise ModelError(f"{folder}: {'; '.join(found)}: remove it from the recipe or chat template, and package again")


def canaries(folder: Path, rows: Iterable[str] = ()) -> Iterator[str]:
    """One line for each find, which says the file and the kind, and never repeats a secret."""
    texts = {path.name: _text(path) for path in sorted(folder.iterdir()) if path.is_file()}
    for name, text in texts.items():
        if SECRET.search(text):
            yield f"{name} holds what looks like a Hub token"
        if name not in _OURS and (path := _LOCAL.search(text)):
            yield f"{name} holds the local path {path[0][:80]}"
    wanted = [(name, _plain(text)) for name, text in texts.items() if name not in _OURS]
    for number, row in enumerate(rows, 1):
        plain = _plain(row)
        if len(plain) >= _SHORTEST_ROW:
            yield from (f"{name} holds row {number} of the data" for name, text in wanted if plain in text)


def training_answers(run: Path) -> list[str]:
    """The answers in a run's training data, for a last look before a push; none where the data are not here."""
    if not (run / "recipe.yaml").is_file():
        return []
    data = load(run / "recipe.yaml", note=lambda line: None).data
    sources = [(data.train, None)] if isinstance(data.train, str) else [(each.path, each.split) for each in data.train]
    found: list[str] = []
    for path, split in sources:
        if Path(path).exists():
            split = split or data.train_split
            with contextlib.suppress(DataError):
                rows = open_source(path, split=None if split == "train" else split, base_folder=run)
                found += [text for row in rows if isinstance(row.values, dict) for text in _answers(row.values)]
    return found


def _answers(row: Mapping[str, Any]) -> Iterator[str]:
    """What the assistant says in a conversation, or the fields that a plain example keeps its answer in."""
    for column in ("messages", "conversations", "completion"):
        with contextlib.suppress(InvalidRow):
            turns = as_turns(row.get(column), column)
            turns = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
            yield from (str(turn.get("content")) for turn in turns if turn.get("role") == "assistant")
    yield from (row[key] for key in ("completion", "output", "response", "answer") if isinstance(row.get(key), str))


def _text(path: Path) -> str:
    """A file's text; of tensors, the header, where names and metadata are."""
    if path.suffix != ".safetensors":
        return path.read_text(encoding="utf-8", errors="replace")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, 64 << 20)).decode("utf-8", errors="replace")


def _plain(text: str) -> str:
    """As it stands in JSON, whitespace alike."""
    return " ".join(json.dumps(text, ensure_ascii=False)[1:-1].replace("\\n", " ").replace("\\\\n", " ").split())
