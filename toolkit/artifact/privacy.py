"""Canaries: nothing secret, local or taken from the data may leave with an artifact; what is found is named.

`portable` cleans what it is given; this looks at the bytes that would really be sent, tensors' headers included. Secret
scanners know tokens, not which folders and rows are this user's, nor what the base's own files have long published.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from toolkit.artifact.allowed import Known, leaves
from toolkit.artifact.manifest import file_entry
from toolkit.artifact.redact import SECRET
from toolkit.checkpoint.headers import raw_header
from toolkit.data.conversation import as_turns
from toolkit.data.problems import InvalidRow
from toolkit.data.sources import open_source
from toolkit.errors import DataError, ModelError
from toolkit.recipe import load

__all__ = ["canaries", "finds", "looked_at", "refuse_canaries", "training_answers"]

# Homes, temporary and mounted folders, with at least one name below them.
_LOCAL = re.compile(
    r"(?<![\w./:-])(?:/(?:home|Users|root|tmp|mnt|media|scratch|workspace)(?:/[\w.-]+)+|[A-Z]:\\\\?Users\\[\w.\\-]*)"
)
_SHORTEST_ROW = 24
"""Characters from which on a text of the data is one that no template or card holds by chance."""

_SHOWN = 6
"""Finds that a message names."""

_VOCABULARY = ("tokenizer.json", "added_tokens.json")
"""The base's own words, among which any may stand."""


def refuse_canaries(
    folder: Path, rows: Iterable[str] = (), known: Known | None = None, *, called: Path | None = None
) -> None:
    """Raise `ModelError` that names each token, local path and row of the data in an artifact's files.

    Args:
        rows: texts of the training data; short ones are not looked for. known: what may stand there.
        called: the folder's name for people, where it is still being written.
    """
    if found := list(dict.fromkeys(canaries(folder, rows, known))):
        more = f"; … ({len(found)} finds in all)" if len(found) > _SHOWN else ""
        raise ModelError(
            f"{called or folder}: {'; '.join(found[:_SHOWN])}{more}: nothing was sent; checkpoints are kept: "
            "take it out and run the same command again"
        )


def canaries(folder: Path, rows: Iterable[str] = (), known: Known | None = None) -> Iterator[str]:
    """One line for each find, which says the file and the kind, and never repeats a secret."""
    known = known or Known()
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not _was_looked_at(path, known)]
    texts = {path.name: _text(path) for path in paths}
    allowed = known.strings | {find for text in known.base for find, _ in finds(text)}
    for name, text in texts.items():
        for find, kind in finds(text, paths=name not in _VOCABULARY):
            if find not in allowed:
                yield f"{name} holds {kind}"
    wanted = [(name, _plain(text)) for name, text in texts.items() if name not in _VOCABULARY]
    said = [_plain(text) for text in (*known.base, *known.words)]
    for number, row in enumerate(rows, 1):
        plain = _plain(row)
        if len(plain) >= _SHORTEST_ROW:
            holders = [name for name, text in wanted if plain in text]
            if holders and not any(plain in text for text in said):
                yield from (f"{name} holds row {number} of the data" for name in holders)


def finds(text: str, *, paths: bool = True) -> Iterator[tuple[str, str]]:
    """What looks like a token or a path of a machine, and how to call it; a token is called without repeating it."""
    yield from ((match[0], "what looks like a Hub token") for match in SECRET.finditer(text))
    if paths:
        found = (match[0].rstrip(".-") for match in _LOCAL.finditer(text))
        yield from ((path, f"the local path {path[:80]}") for path in found)


def looked_at(folder: Path, names: Iterable[str], facts: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """What a manifest remembers of a look at an artifact, so that a later one does not need the base and the template.

    Args:
        names: of files that came with the base or the chat template. facts: what else the manifest will say.

    Returns:
        `files`: their SHA-256; `strings`: paths in the artifact that the base's own files hold.
    """
    theirs = {find for text in known.base for find, _ in finds(text)}
    ours = "\n".join(leaves(facts))
    there = {path.name: file_entry(path)["sha256"] for path in sorted(folder.iterdir()) if path.name in names}
    return {"files": there, "strings": sorted(theirs & {find for find, _ in finds(ours)})}


def _was_looked_at(path: Path, known: Known) -> bool:
    return path.name in known.files and file_entry(path)["sha256"] == known.files[path.name]


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
    """A file's text, of JSON what its strings say; of tensors, the header, where names and metadata are."""
    if path.suffix == ".safetensors":
        text = raw_header(path).decode("utf-8", errors="replace")
    else:
        text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix not in (".json", ".safetensors") or path.name in _VOCABULARY:
        return text
    try:
        return "\n".join(leaves(json.loads(text)))
    except (ValueError, RecursionError):
        return text


def _plain(text: str) -> str:
    """Whitespace alike."""
    return " ".join(text.split())
