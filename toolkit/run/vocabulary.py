"""Whether the model has a row for every token of the data, before it is loaded.

A tokenizer may hold tokens that nobody added to the embedding: looking one up ends a run at whatever step it comes to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from toolkit.data import Batches
from toolkit.data.storage import largest_ids
from toolkit.errors import DataError
from toolkit.plan import Plan
from toolkit.plan.skeletons import shape_of

__all__ = ["require_known_tokens"]


def require_known_tokens(
    tokenizer: PreTrainedTokenizerBase, batches: Batches, general: Dataset | None, plan: Plan
) -> None:
    """Raise `DataError` where a token of the data, or the one that pads them, is beyond the embedding's last row."""
    rows = _rows(plan)
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
    "give the tokenizer that this checkpoint was made with, or a checkpoint whose embedding was resized for this one"
)


def _told(tokenizer: PreTrainedTokenizerBase, token: int, rows: int) -> str:
    text = tokenizer.convert_ids_to_tokens(token)
    return f"token {token} ({text!r}) has no row in the model's embedding, which has {rows:,}"


def _rows(plan: Plan) -> int:
    """Of the embedding."""
    return int(shape_of(plan.model, plan.recipe.model.revision).get_input_embeddings().weight.shape[0])


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
