"""General text as windows of tokens, on which perplexity before and after says what the model has forgotten."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from toolkit.errors import DataError

__all__ = ["read_windows"]

_MOST_WINDOWS = 64


def read_windows(tokenizer: PreTrainedTokenizerBase, path: Path, length: int) -> Dataset:
    """Rows of `input_ids` and equal `labels`, both (length,), from the start of a UTF-8 text, 64 of them at most.

    Raises:
        DataError: the file cannot be read as text, or is shorter than one window.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"eval.regression: {path}: not a readable UTF-8 text ({error})") from None
    # A token has a character at least, so what lies beyond is never looked at.
    ids = list(tokenizer(text[: _MOST_WINDOWS * length * 16], add_special_tokens=False, verbose=False)["input_ids"])
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:_MOST_WINDOWS]
    if not windows:
        raise DataError(f"eval.regression: {path}: {len(ids)} tokens, less than one training.max_length of {length}")
    return Dataset.from_dict({"input_ids": windows, "labels": windows})
