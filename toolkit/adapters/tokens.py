"""Rows of the embedding and the head for tokens that the base never saw or learnt: made, and trained by PEFT alone.

PEFT's trainable tokens train rows that are there. Making them, setting what they begin as, and finding out which
models PEFT computes otherwise than their family does is left to whoever calls it.

    V vocabulary, H hidden
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from transformers import PreTrainedModel

from toolkit.architecture import unwrapped
from toolkit.errors import ModelError

__all__ = [
    "INDICES",
    "TokenRows",
    "add_rows",
    "let_fused_heads_in",
    "make_room",
    "refuse_tokens",
    "require_rows",
    "rows_of",
    "token_ids",
    "token_layers",
    "token_targets",
]

INDICES = "trainable_token_indices"
"""PEFT's field of an adapter's configuration for tokens by module."""
_FIELDS = "model.new_tokens and model.trained_tokens"


@dataclass(frozen=True)
class TokenRows:
    """Tokens whose rows are trained: their ids, and of each the tokens whose mean it begins as, which may be itself."""

    ids: tuple[int, ...] = ()
    pieces: tuple[tuple[int, ...], ...] = ()


def rows_of(model: PreTrainedModel) -> int:
    """Rows of the embedding, V."""
    return len(unwrapped(model.get_input_embeddings()).get_parameter("weight"))


def make_room(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Resize embedding and head to the last of these tokens, where they have too few rows."""
    if ids and max(ids) >= rows_of(model):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)


@torch.no_grad()
def add_rows(model: PreTrainedModel, tokens: TokenRows) -> None:
    """Give tokens their rows, in the embedding and in a head that is not tied to it: the mean of their pieces'.

    Rows that a checkpoint has to spare are taken; where there are too few, both are resized to the last new token.

    Args:
        model: loaded or on meta, without an adapter.
    """
    if not tokens.ids:
        return
    make_room(model, tokens.ids)
    for _, layer in _ends(model):
        weight_VH = layer.weight
        for number, pieces in zip(tokens.ids, tokens.pieces, strict=True):
            weight_VH[number] = weight_VH[list(pieces)].float().mean(0).to(weight_VH.dtype)


def refuse_tokens(model: PreTrainedModel) -> None:
    """Raise `ModelError` where PEFT would compute tokens otherwise than the family does; asked of a skeleton.

    PEFT looks rows up and multiplies by them itself: what a family's own embedding does to rows, and a head's bias, are
    lost for every token. A table beside the embedding that has a row for each token, as families with embeddings in
    every layer and with hashed routing have, gets no row from it.
    """
    ends = _ends(model)
    for name, layer in ends:
        if (lost := _lost(layer)) is not None:
            raise ModelError(f"{_FIELDS}: {name} of this model has {lost}, which PEFT's trainable tokens leave out")
    own = {id(layer.weight) for _, layer in ends}
    tables = (*model.named_parameters(), *model.named_buffers())
    rows = rows_of(model)
    beside = [name for name, table in tables if table.dim() > 1 and len(table) == rows and id(table) not in own]
    if beside:
        raise ModelError(
            f"{_FIELDS}: {beside[0]} of this model has a row for each token as well, which an adapter cannot "
            "carry; write the tokens as text that the tokenizer has"
        )


def _lost(layer: nn.Module) -> str | None:
    """What PEFT's layer of trained rows passes over; a factor of the embedding (`embed_scale`) it knows."""
    if getattr(layer, "bias", None) is not None:
        return "a bias"
    kind = type(layer)
    is_plain = kind.forward in (nn.Embedding.forward, nn.Linear.forward) or hasattr(layer, "embed_scale")
    return None if is_plain else f"a forward of its own ({kind.__name__})"


def token_targets(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: modules by name; a tied head follows the embedding and is not named."""
    return {name: list(ids) for name, _ in _ends(model)}


def token_ids(config: Mapping[str, Any]) -> list[int]:
    """The tokens whose rows an adapter's configuration says it holds."""
    found = config.get(INDICES) or []
    each = [found] if isinstance(found, list) else list(found.values()) if isinstance(found, Mapping) else []
    return sorted({number for ids in each for number in ids if isinstance(number, int)})


def require_rows(model: PreTrainedModel, config: Mapping[str, Any], folder: str | Path) -> None:
    """Raise `ModelError` where an adapter holds rows of tokens that the model has none for."""
    ids = token_ids(config)
    if ids and max(ids) >= rows_of(model):
        raise ModelError(
            f"{folder}: holds the row of token {max(ids)}, and the model's embedding has {rows_of(model):,}; call "
            f"model.resize_token_embeddings({max(ids) + 1}, mean_resizing=False) first"
        )


def token_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers of trained rows, by name: the embedding's first."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, TrainableTokensLayer)]
    yield from sorted(found, key=lambda each: isinstance(each[1].base_layer, nn.Linear))


def let_fused_heads_in(model: PeftModel) -> None:
    """Say that a head which PEFT wrapped has no bias: TRL's fused head asks, and the wrapper hands on its weight alone.

    Source: `TrainableTokensWrapper._hasattr_wrapped` of peft 0.21, `add_fused_lm_head` of trl 1.16.
    """
    head = model.get_base_model().get_output_embeddings()
    if head is not None and unwrapped(head) is not head:
        head.register_parameter("bias", None)


def _ends(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """The embedding, and the head where it has a weight of its own, each by its name."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{_FIELDS}: this model has no output head that tokens could be given rows in")
    names = {id(module): name for name, module in model.named_modules()}
    layers = [embedding] if head.weight is embedding.weight else [embedding, head]
    return [(names[id(layer)], layer) for layer in layers]
