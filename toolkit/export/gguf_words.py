"""The tokenizer inside a merged GGUF file: the base's, if a file of it is given, or the adapter's own, written here.

Nothing but a comparison shows whether llama.cpp would cut text as the model was taught. What is written is read back by
transformers' own reader of such files, and every token and a set of awkward texts must come out the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from toolkit.artifact.tokenizer import same_tokens
from toolkit.checkpoint.formats.gguf_file import GgufFile, library, read_header
from toolkit.checkpoint.formats.gguf_metadata import add_vocabulary
from toolkit.checkpoint.formats.gguf_tokenizer import load_tokenizer
from toolkit.errors import ModelError
from toolkit.families import GGUF_SPLITS

__all__ = ["add_words", "require_same_words"]

_TOKENS = "tokenizer.ggml.tokens"


def require_same_words(artifact: Path, file: GgufFile) -> None:
    """Raise `ModelError` where the tokens of a base's file are not those of the adapter's tokenizer."""
    tokens = file.metadata.get(_TOKENS)
    if tokens is None or not (artifact / "tokenizer.json").is_file():
        return
    for word, number in AutoTokenizer.from_pretrained(artifact).get_vocab().items():
        found = tokens[number] if number < len(tokens) else None
        if found != word:
            raise ModelError(
                f"{file.files[0]}: token {number} is {found!r} there and {word!r} in the adapter's tokenizer: give the "
                "GGUF file of this base"
            )


def add_words(writer: Any, artifact: Path, size: int, architecture: str) -> None:
    """Give the adapter's tokenizer to a `GGUFWriter`, in the way of splitting text under which it reads back as itself.

    Raises:
        ModelError: there is none.
    """
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    if (count := max(tokenizer.get_vocab().values()) + 1) > size:
        raise ModelError(
            f"gguf-merged: the tokenizer has {count} tokens and the embedding {size} rows, which no GGUF file can "
            "hold: export as merged"
        )
    whole_words = bool(getattr(tokenizer.backend_tokenizer.model, "ignore_merges", False))
    for pre, takes_whole_words in GGUF_SPLITS.items():
        if takes_whole_words != whole_words:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "words.gguf"
            probe = library().GGUFWriter(str(path), architecture)
            add_vocabulary(probe, tokenizer, size, pre)
            probe.write_header_to_file()
            probe.write_kv_data_to_file()
            probe.write_ti_data_to_file()
            probe.close()
            if same_tokens(tokenizer, load_tokenizer(read_header(path))):
                add_vocabulary(writer, tokenizer, size, pre)
                return
    raise ModelError(
        "gguf-merged: how this tokenizer cuts text has no name that a GGUF file could give it: give a GGUF file of the "
        "base with --base-gguf"
    )
