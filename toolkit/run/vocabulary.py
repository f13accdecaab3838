"""New tokens of a run, and whether the model has a row for every token of the data, before it is loaded.

A tokenizer may hold tokens that nobody added to the embedding: looking one up ends a run at whatever step it comes to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from toolkit.adapters.tokens import NewTokens, refuse_tokens, rows_of
from toolkit.data import Batches
from toolkit.data.storage import largest_ids, tokens_in
from toolkit.errors import DataError, ModelError, RecipeError
from toolkit.plan import Plan
from toolkit.plan.skeletons import shape_of

__all__ = ["add_tokens", "new_tokens_of", "require_known_tokens", "require_new_tokens", "require_seen", "told_tokens"]

_FIELD = "model.new_tokens"


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Add tokens to a tokenizer: found as they stand in any text, and written in answers. Those it has stay."""
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])


def new_tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> NewTokens:
    """Ids of added tokens, and what the tokenizer would make of their texts had they not been added.

    Raises:
        ModelError: the tokenizer is none whose added tokens can be looked at, or makes nothing of a text.
    """
    if not texts:
        return NewTokens()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{_FIELD}: {type(tokenizer).__name__} has no tokenizer.json; use a base with a fast tokenizer"
        )
    told = json.loads(backend.to_str())
    told["added_tokens"] = [each for each in told["added_tokens"] if each["content"] not in texts]
    before = Tokenizer.from_str(json.dumps({**told, "padding": None, "truncation": None}))
    words = tokenizer.get_vocab()
    pieces = [tuple(before.encode(text, add_special_tokens=False).ids) for text in texts]
    if nothing := next((text for text, ids in zip(texts, pieces, strict=True) if not ids), None):
        raise ModelError(f"{_FIELD}: the tokenizer makes nothing of {nothing!r}; give another text")
    return NewTokens(tuple(words[text] for text in texts), tuple(pieces))


def require_new_tokens(untouched: PreTrainedTokenizerBase, plan: Plan) -> None:
    """Raise unless the recipe's new tokens can be added and trained; asked of a tokenizer that has not got them yet.

    Raises:
        RecipeError: one is a token already. ModelError: tokens would be left without a row, or the model is of a family
            that PEFT computes otherwise with trained rows.
    """
    texts = plan.recipe.model.new_tokens
    if not texts:
        return
    skeleton = shape_of(plan.model, plan.recipe.model.revision)
    refuse_tokens(skeleton)
    words, rows = untouched.get_vocab(), rows_of(skeleton)
    for text in texts:
        if words.get(text, rows) < rows:
            kind = "a special token" if text in untouched.all_special_tokens else "a token"
            raise RecipeError(f"{_FIELD}: {text!r} is {kind} of this tokenizer already ({words[text]}); remove it")
    add_tokens(untouched, texts)
    words = untouched.get_vocab()
    last = max(words[text] for text in texts)
    bare = sorted(word for word, number in words.items() if rows <= number <= last and word not in texts)
    if bare:
        named = ", ".join(map(repr, bare[:3])) + (", …" if len(bare) > 3 else "")
        raise ModelError(f"{_FIELD}: {named} of this tokenizer has no row in the embedding either; list it, too")
    new_tokens_of(untouched, texts)


def told_tokens(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> dict[str, Any] | None:
    """New tokens as the manifest has them; None where there are none."""
    texts, words = plan.recipe.model.new_tokens, tokenizer.get_vocab()
    if not texts:
        return None
    before, after = rows_of(shape_of(plan.model, plan.recipe.model.revision)), _rows(tokenizer, plan)
    return {"ids": {text: words[text] for text in texts}, **({"rows": after} if after > before else {})}


def require_seen(tokenizer: PreTrainedTokenizerBase, batches: Batches, plan: Plan, say: Callable[[str], None]) -> None:
    """Say which new tokens no training example has: nothing is learnt of them but that they never come.

    Raises:
        DataError: that is so of all of them, and the model does not write its examples itself.
    """
    texts = plan.recipe.model.new_tokens
    if not texts:
        return
    words = tokenizer.get_vocab()
    seen = tokens_in(batches.train, [words[text] for text in texts])
    unseen = [text for text in texts if words[text] not in seen]
    named = ", ".join(map(repr, unseen[:5])) + (", …" if len(unseen) > 5 else "")
    if len(unseen) == len(texts) and not batches.questions:
        raise DataError(f"{_FIELD}: none of {named} is in a training example; write them into the data, or remove them")
    what = f"; not {named}, whose rows learn nothing of use" if unseen else ""
    say(f"new tokens: {len(texts) - len(unseen)} of {len(texts)} are in the training examples{what}")


def require_known_tokens(
    tokenizer: PreTrainedTokenizerBase, batches: Batches, general: Dataset | None, plan: Plan
) -> None:
    """Raise `DataError` where a token of the data, or the one that pads them, is beyond the embedding's last row."""
    rows = _rows(tokenizer, plan)
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= rows:
        raise DataError(f"{_told(tokenizer, pad, rows)}, and it pads shorter examples; {_ADVICE}")
    for what, largest, places in _largest(batches, general):
        beyond = np.flatnonzero(largest >= rows)
        if len(beyond):
            first = int(beyond[0])
            where = f"{places[first]}: " if first < len(places) else ""
            count = f"in {len(beyond)} of {len(largest)} {what}"
            raise DataError(f"{where}{_told(tokenizer, int(largest[first]), rows)} ({count}); {_ADVICE}")


_ADVICE = (
    "list it in model.new_tokens, or give the tokenizer that this checkpoint was made with, or a checkpoint whose "
    "embedding was resized for this one"
)


def _told(tokenizer: PreTrainedTokenizerBase, token: int, rows: int) -> str:
    text = tokenizer.convert_ids_to_tokens(token)
    return f"token {token} ({text!r}) has no row in the model's embedding, which has {rows:,}"


def _rows(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> int:
    """Of the embedding, once new tokens have theirs."""
    words = tokenizer.get_vocab() if plan.recipe.model.new_tokens else {}
    rows = rows_of(shape_of(plan.model, plan.recipe.model.revision))
    return max(rows, *(words[text] + 1 for text in plan.recipe.model.new_tokens)) if words else rows


def _largest(batches: Batches, general: Dataset | None) -> Iterator[tuple[str, NDArray[np.int64], Sequence[str]]]:
    """By kind of data: the largest token of each row, and where rows came from where that is known."""
    sides = "answers of pairs" if batches.pairs else "training examples"
    yield sides, largest_ids(batches.train), batches.places
    if batches.validation is not None:
        yield "held-out examples", largest_ids(batches.validation), ()
    prompts = [max(question.prompt_ids, default=0) for question in batches.held_out]
    yield "held-out prompts", np.asarray(prompts, dtype=np.int64), ()
    if general is not None:
        yield "windows of eval.regression", largest_ids(general), ()
