"""What may leave the machine: nothing secret, local or taken from the data goes with an artifact, and finds are named.

A resolved recipe, a tokenizer's configuration and an evaluation's results all carry such things; `portable` cleans
them, and `canaries` looks at the bytes that would really be sent, tensors' headers included. Secret scanners know
tokens, not which folders and rows are this user's. A template may name a folder, or hold a sentence that an answer of
the data repeats: no scanner can tell that from a leak, so the base's own files and words written by hand are known.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.artifact.manifest import file_entry
from toolkit.checkpoint.files import gguf_at, raw_header
from toolkit.data.envelopes import unwrapped
from toolkit.data.problems import InvalidRow
from toolkit.data.sources import open_source
from toolkit.data.speakers import as_turns
from toolkit.errors import DataError, ModelError
from toolkit.recipe import load

__all__ = [
    "Known",
    "base_texts",
    "canaries",
    "figures",
    "finds",
    "leaves",
    "looked_at",
    "portable",
    "refuse_canaries",
    "training_answers",
]

# Not every `…_token` is a secret: tokenizers have an `eos_token`.
_SECRET_KEY = re.compile(
    r"(^|_)(secret|password|passwd|api_?key|credentials?)$|^token$|(hub|hf|auth|access|api|bearer)_token$",
    re.IGNORECASE,
)
_SECRET = re.compile(r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}")
_TIMING = re.compile(r"(^|_)(seconds?|runtime|duration|milliseconds)(_|$)")
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_ABSOLUTE = re.compile(r"(?:file://)?(?:/|~[^/\s]*/|\.\.[/\\]|[A-Za-z]:[/\\])[^\n]*")

_LARGEST = 64 << 20
"""Bytes of a file of the base that is read."""

_PATTERNS = ("*.json", "*.jinja", "additional_chat_templates/*.jinja")
_BASE_VOCABULARY = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json"})

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


def portable(value: Any) -> Any:
    """`value` (JSON-like) without secrets and without paths of this machine.

    Keys that name a secret are left out; a string that is an absolute path, or leads out of the working folder, keeps
    only its last part; the home, working and temporary folders are cut out of longer text; tokens and URL logins are
    removed. Non-finite numbers become None, as JSON has none; a date becomes text.
    """
    if isinstance(value, Mapping):
        return {
            str(k): _without_secrets(v) if k == "system_prompt" and isinstance(v, str) else portable(v)
            for k, v in value.items()
            if not _SECRET_KEY.search(str(k)) or _is_number(v)
        }
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return _portable_text(value)
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)  # a date of the recipe's


def figures(value: Any) -> Any:
    """The numbers of nested results under their keys; text, where samples and answers live, is left out.

    So is what the clock says: the same run on the same machine is to give the same bytes.
    """
    if isinstance(value, Mapping):
        told = {k: v for k, v in value.items() if not _TIMING.search(str(k))}
        kept = {str(k): figures(v) for k, v in told.items() if isinstance(v, Mapping) or _is_number(v)}
        return {k: v for k, v in kept.items() if v != {}}
    return portable(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _portable_text(text: str) -> str:
    if _ABSOLUTE.fullmatch(text) and len(parts := [p for p in re.split(r"[/\\]", text) if p]) > 1:
        return _SECRET.sub("[removed]", parts[-1])
    return _without_secrets(text)


def _without_secrets(text: str) -> str:
    """Prose, which may begin with a slash without being a path."""
    text = _URL_LOGIN.sub("", _SECRET.sub("[removed]", text))
    # That there is a temporary folder says nothing of this machine; what lies in it does.
    whole, below = r"(?![\w-]|\.\w)", r"(?=/\w)"
    ends = ((Path.cwd(), ".", whole), (Path.home(), "~", whole), (Path(tempfile.gettempdir()), "~", below))
    for folder, stand_in, end in ends:
        if len(folder.parts) > 1:
            text = re.sub(rf"{re.escape(str(folder))}{end}", stand_in, text)
    return text


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
    """The texts in a base's configurations and templates, as they read; of its vocabulary what looks like a token.

    Args:
        folder: or a GGUF file, whose templates are inside.
    """
    if folder is None:
        return ()
    inside: list[str] = []
    with contextlib.suppress(ModelError):
        if path := gguf_at(folder):
            from toolkit.checkpoint.gguf_source import templates_of

            inside = templates_of(path)
    paths = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})
    read = [path for path in paths if not path.name.endswith(".index.json")]
    beside = [text for path in read if path.stat().st_size <= _LARGEST for text in _texts(path)]
    return tuple(dict.fromkeys([*inside, *beside]))


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
    if path.name in _BASE_VOCABULARY:
        return _SECRET.findall(text)
    if path.suffix != ".json":
        return [text]
    try:
        return list(leaves(json.loads(text)))
    except (ValueError, RecursionError):
        return [text]


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
    yield from ((match[0], "what looks like a Hub token") for match in _SECRET.finditer(text))
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
    with contextlib.suppress(InvalidRow):
        row = unwrapped(row, pairs=True, judged=False)
    for column in ("messages", "conversations", "completion", "chosen", "rejected"):
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
