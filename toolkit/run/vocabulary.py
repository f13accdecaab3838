"""Tokens whose rows a run trains, and whether the model has a row for every token of the data, before it is loaded.

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

from toolkit.adapters.tokens import TokenRows, refuse_tokens, rows_of
from toolkit.data import Batches
from toolkit.data.storage import largest_ids, tokens_in
from toolkit.errors import DataError, ModelError, RecipeError
from toolkit.plan import Plan
from toolkit.plan.skeletons import shape_of

__all__ = ["add_tokens", "require_known_tokens", "require_seen", "require_trainable", "token_rows", "told_tokens"]

_NEW, _TRAINED = "model.new_tokens", "model.trained_tokens"


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Add tokens to a tokenizer: found as they stand in any text, and written in answers. Those it has stay."""
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])


def token_rows(tokenizer: PreTrainedTokenizerBase, new: Sequence[str], known: Sequence[str] = ()) -> TokenRows:
    """Ids of tokens whose rows are trained; an added one begins as what its text would be without it.

    Args:
        new: texts of tokens that were added. known: those that the tokenizer had, which begin as they are.

    Raises:
        ModelError: the tokenizer is none whose added tokens can be looked at, or makes nothing of a text.
    """
    words = tokenizer.get_vocab()
    pieces = [*_pieces(tokenizer, new), *((words[text],) for text in known)]
    return TokenRows(tuple(words[text] for text in (*new, *known)), tuple(pieces))


def _pieces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[int, ...]]:
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{_NEW}: {type(tokenizer).__name__} has no tokenizer.json; use a base with a fast tokenizer")
    told = json.loads(backend.to_str())
    told["added_tokens"] = [each for each in told["added_tokens"] if each["content"] not in texts]
    before = Tokenizer.from_str(json.dumps({**told, "padding": None, "truncation": None}))
    pieces = [tuple(before.encode(text, add_special_tokens=False).ids) for text in texts]
    if nothing := next((text for text, ids in zip(texts, pieces, strict=True) if not ids), None):
        raise ModelError(f"{_NEW}: the tokenizer makes nothing of {nothing!r}; give another text")
    return pieces


def require_trainable(untouched: PreTrainedTokenizerBase, plan: Plan) -> None:
    """Raise unless the rows of the recipe's tokens can be trained; asked of a tokenizer that has no new ones yet.

    Raises:
        RecipeError: a new one is a token already, or one that is not new is none. ModelError: tokens would be left
            without a row, or the model is of a family that PEFT computes otherwise with trained rows.
    """
    texts, known = plan.recipe.model.new_tokens, plan.recipe.model.trained_tokens
    skeleton = shape_of(plan.model, plan.recipe.model.revision)
    refuse_tokens(skeleton)
    words, rows = untouched.get_vocab(), rows_of(skeleton)
    for text in known:
        if words.get(text, rows) >= rows:
            what = "has no row in the embedding" if text in words else "is no token of this tokenizer"
            raise RecipeError(f"{_TRAINED}: {text!r} {what}; list it in {_NEW}, or remove it")
    for text in texts:
        if words.get(text, rows) < rows:
            kind = "a special token" if text in untouched.all_special_tokens else "a token"
            raise RecipeError(
                f"{_NEW}: {text!r} is {kind} of this tokenizer already ({words[text]}); remove it, or list it in "
                f"{_TRAINED} to train its row"
            )
    add_tokens(untouched, texts)
    words = untouched.get_vocab()
    last = max((words[text] for text in texts), default=0)
    bare = sorted(word for word, number in words.items() if rows <= number <= last and word not in texts)
    if bare:
        named = ", ".join(map(repr, bare[:3])) + (", …" if len(bare) > 3 else "")
        raise ModelError(f"{_NEW}: {named} of this tokenizer has no row in the embedding either; list it, too")
    token_rows(untouched, texts, known)


def told_tokens(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> dict[str, Any] | None:
    """Tokens with trained rows as the manifest has them; None where there are none."""
    texts, words = plan.recipe.model.row_tokens, tokenizer.get_vocab()
    if not texts:
        return None
    before, after = rows_of(shape_of(plan.model, plan.recipe.model.revision)), _rows(tokenizer, plan)
    return {"ids": {text: words[text] for text in texts}, **({"rows": after} if after > before else {})}


def require_seen(tokenizer: PreTrainedTokenizerBase, batches: Batches, plan: Plan, say: Callable[[str], None]) -> None:
    """Say which tokens with trained rows no training example has: nothing is learnt of them but that they never come.

    Raises:
        DataError: that is so of all of them, and the model does not write its examples itself.
    """
    asked = plan.recipe.model
    texts = asked.row_tokens
    if not texts:
        return
    words = tokenizer.get_vocab()
    seen = tokens_in(batches.train, [words[text] for text in texts])
    unseen = [text for text in texts if words[text] not in seen]
    named = ", ".join(map(repr, unseen[:5])) + (", …" if len(unseen) > 5 else "")
    if len(unseen) == len(texts) and not batches.questions:
        field = _NEW if asked.new_tokens else _TRAINED
        raise DataError(f"{field}: none of {named} is in a training example; write them into the data, or remove them")
    what = f"; not {named}, whose rows learn nothing of use" if unseen else ""
    kind = "tokens with trained rows" if asked.trained_tokens else "new tokens"
    say(f"{kind}: {len(texts) - len(unseen)} of {len(texts)} are in the training examples{what}")


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
