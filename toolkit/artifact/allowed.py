"""What may stand in an artifact because it is no secret of the run's: the base's own files, and words written by hand.

A chat template may name a folder, or hold a sentence that an answer of the data repeats; a recipe may quote one. No
scanner can tell these from a leak by the text alone, so they are read from where they come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.artifact.redact import SECRET

__all__ = ["Known", "base_texts", "leaves"]

_LARGEST = 64 << 20
"""Bytes of a file of the base that is read."""

_PATTERNS = ("*.json", "*.jinja", "additional_chat_templates/*.jinja")
_VOCABULARY = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json"})


@dataclass(frozen=True)
class Known:
    """Texts that are no find: `base` are those of the base's own files, `words` what the user and our card say.

    In a base's text everything is known, in words only what the data repeat: a path in a recipe is the user's.
    `strings` and `files` are what an artifact's manifest remembers: paths of a base that need not be here any more, and
    the SHA-256 by name of files that were looked at when they were written.
    """

    base: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    strings: frozenset[str] = frozenset()
    files: Mapping[str, str] = field(default_factory=dict)


def base_texts(folder: Path | None) -> tuple[str, ...]:
    """The texts in a base's configurations and templates, as they read; of its vocabulary what looks like a token."""
    if folder is None:
        return ()
    paths = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})
    read = [path for path in paths if not path.name.endswith(".index.json")]
    return tuple(dict.fromkeys(text for path in read if path.stat().st_size <= _LARGEST for text in _texts(path)))


def leaves(value: Any) -> Iterator[str]:
    """Every string in JSON-like data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key)
            yield from leaves(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from leaves(one)


def _texts(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.name in _VOCABULARY:
        return SECRET.findall(text)
    if path.suffix != ".json":
        return [text]
    try:
        return list(leaves(json.loads(text)))
    except (ValueError, RecursionError):
        return [text]
