"""The tokenizer of a GGUF file, where transformers builds the one that the model was trained with, and only there.

It takes a byte-level vocabulary whose way of splitting text it does not know for GPT-2's, drops a space that begins a
text of a SentencePiece vocabulary, and leaves out Unicode normalisation, of which the file says nothing.
"""

from __future__ import annotations

from typing import Any

from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from toolkit.checkpoint.formats.gguf_file import GgufFile
from toolkit.errors import ModelError, first_line
from toolkit.families import GGUF_NORMALISED

__all__ = ["load_tokenizer", "tokenizer_place"]

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BESIDE, _INSIDE = "the files beside it", "the GGUF file"


def tokenizer_place(file: GgufFile) -> str:
    """Where the tokenizer comes from, in words: "the files beside it", "the GGUF file", or why it must be given."""
    if any((file.files[0].parent / name).is_file() for name in _FILES):
        return _BESIDE
    kind, split = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2":
        return f"elsewhere: of the kind {str(kind)[:40]}, which transformers does not build as the model had it"
    if split not in GGUF_PRE_TOKENIZER_SPLITS and split != "gpt-2":
        return f"elsewhere: transformers does not know how {str(split)[:40]} splits text"
    return _INSIDE


def load_tokenizer(file: GgufFile) -> Any:
    """The tokenizer.

    Raises:
        ModelError: it must be given, or what the file says of it cannot be.
    """
    where, place = file.files[0], tokenizer_place(file)
    try:
        if place == _BESIDE:
            return AutoTokenizer.from_pretrained(where.parent, trust_remote_code=False)
        if place == _INSIDE:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(where.parent), gguf_file=where.name)
            if file.metadata.get("tokenizer.ggml.pre") in GGUF_NORMALISED:
                tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
            return tokenizer
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        place = f"elsewhere: {first_line(error)[:120]}"
    raise ModelError(f"{where}: its tokenizer must come from {place}; set model.tokenizer_name_or_path")
