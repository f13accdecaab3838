"""Prompt and answer as tokens, each apart, as inference has them: it is fed the prompt's and writes the answer's.

Tokenised as one text, the end of a prompt and the beginning of an answer may become one token that inference never
sees. Tokenizers that write a space before every text would put one into each answer, which is kept from them here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from toolkit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Tokens"]

_WORD = "word"


class Tokens:
    """A tokenizer for prompts and what follows them.

    Raises:
        DataError: it is not a fast one, or has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError("the tokenizer is not a fast one; the checkpoint needs a tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token, so no answer could end; set its eos_token")
        self._tokenizer: Any = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        end, after = self.of([f"{_WORD}\n", f"{_WORD}\n{_WORD}"])
        self._is_prefixing = after[: len(end)] != end or after[len(end) :] != self.of([_WORD])[0]

    def of(self, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
        """Tokens of each text; `plain` text gets the tokenizer's own special tokens, templates write theirs."""
        if not texts:
            return []
        batch = self._tokenizer(
            list(texts),
            add_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = batch["input_ids"]
        return [self._begun(each) for each in ids] if plain else ids

    def after(
        self, pairs: Sequence[tuple[str, str]], prompts: Sequence[list[int]], *, plain: bool = False
    ) -> list[list[int]]:
        """Tokens of each pair's second text where it follows the first, whose tokens are `prompts`."""
        if not self._is_prefixing:
            return self.of([text for _, text in pairs])
        wholes = self.of([before + text for before, text in pairs], plain=plain)
        alone = self.of([text for _, text in pairs])
        return [
            whole[len(prompt) :] if whole[: len(prompt)] == prompt and len(whole) > len(prompt) else apart
            for whole, prompt, apart in zip(wholes, prompts, alone, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of these tokens, as it is."""
        return str(
            self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def _begun(self, ids: list[int]) -> list[int]:
        """Plain text to be gone on with: at most one beginning-of-sequence token, and no end."""
        bos = self._tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.eos else ids
