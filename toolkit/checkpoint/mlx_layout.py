"""What mlx-lm stores otherwise than its publisher, under the publisher's names again; still unread.

Its converter turns convolutions, [C, K, 1], adds the 1 to norms that are held as a distance from it, cuts the up
projection of latent attention in two by heads, and renames layers. Source: each model's `sanitize` in mlx-lm 0.32.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from toolkit.checkpoint.conversion import targets
from toolkit.checkpoint.weights import Unread, unread
from toolkit.families import MLX_ADDS_ONE

__all__ = ["published"]

_NAMES = (
    (r"\.switch_mlp\.fc1\.", ".switch_mlp.up_proj."),  # Nemotron-H
    (r"\.switch_mlp\.fc2\.", ".switch_mlp.down_proj."),
    (r"\.feed_forward\.gate_proj\.", ".feed_forward.w1."),  # dense layers of LFM2-MoE
    (r"\.feed_forward\.down_proj\.", ".feed_forward.w2."),
    (r"\.feed_forward\.up_proj\.", ".feed_forward.w3."),
    (r"\.mlp\.gate\.proj\.", ".mlp.gate."),  # Laguna
    (r"^language_model\.model\.", "model.language_model."),  # Qwen3.5
    (r"^language_model\.", ""),
)
"""Patterns of names that no parameter has, each with what the publisher has instead."""
_NORM = re.compile(
    r"(?:\.input_layernorm|\.post_attention_layernorm|\.[qk]_norm|(?:^|\.)(?:model|language_model)\.norm)\.weight$"
)
_QUERY, _VALUE, _BOTH = "embed_q.weight", "unembed_out.weight", "kv_b_proj.weight"


class Turned(Unread):
    """A small weight that is made of whole others when it is read.

    Args:
        pieces: what it is made of. make: from their values to its own, pure.
    """

    def __init__(
        self,
        pieces: Sequence[Any],
        make: Callable[..., Tensor],
        shape: Sequence[int],
        rows: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(shape, rows)
        self._pieces, self._make = [unread(piece) for piece in pieces], make

    def get_dtype(self) -> str:
        """Of its first piece."""
        return self._pieces[0].get_dtype()

    def read(self, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """All of it, in fp32 until it is whole."""
        whole = self._make(*(piece.read(device) for piece in self._pieces))
        return whole[self._first : self._last].to(dtype).contiguous()

    @property
    def four_bit(self) -> None:
        """It is never kept as it is stored."""
        return None

    def codes(self, device: Any = "cpu") -> tuple[Tensor, Tensor]:
        """There are none.

        Raises:
            ValueError: always.
        """
        raise ValueError("what is put together from others has no codes of its own")

    def pages(self) -> Iterator[Tensor]:
        """Of its pieces."""
        return (page for piece in self._pieces for page in piece.pages())

    def _of(self, first: int, last: int) -> Self:
        return type(self)(self._pieces, self._make, self._whole, (first, last))


def published(weights: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Slices by the publisher's keys, as far as the families are known; all others stay.

    Args:
        weights: slices by key. model: on meta.
    """
    found = _renamed(weights, model)
    state, names = model.state_dict(), targets(model, get_model_conversion_mapping(model), found)
    turned = {key for key, part in found.items() if _is_turned(part, state.get(names[key]))}
    adds_one = turned and model.config.get_text_config().model_type in MLX_ADDS_ONE
    result: dict[str, Any] = {}
    for key, part in found.items():
        shape = part.get_shape()
        if key in turned:
            result[key] = Turned([part], lambda value: value.transpose(1, 2), (shape[0], shape[2], shape[1]))
        elif adds_one and _NORM.search(key) and len(shape) == 1:
            result[key] = Turned([part], lambda value: value - 1, shape)
        else:
            result[key] = part
    return _joined(result)


def _renamed(weights: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    state, names = model.state_dict(), targets(model, get_model_conversion_mapping(model), weights)
    result = {}
    for key, part in weights.items():
        if names[key] not in state:
            for pattern, name in _NAMES:
                key = re.sub(pattern, name, key)
        result[key] = part
    return result


def _is_turned(part: Any, parameter: Tensor | None) -> bool:
    """Whether these are the weights of a convolution [C, 1, K], stored as [C, K, 1]."""
    if parameter is None or parameter.dim() != 3 or parameter.shape[1] != 1:
        return False
    channels, _, width = parameter.shape
    return width > 1 and tuple(part.get_shape()) == (channels, width, 1)


def _joined(weights: dict[str, Any]) -> dict[str, Any]:
    """With what latent attention makes of the compressed rows, [H·(D + V), R], from [H, R, D] and [H, V, R]."""
    for key in [key for key in weights if key.endswith(f".{_QUERY}")]:
        stem = key.removesuffix(_QUERY)
        query, value = weights[key], weights.get(f"{stem}{_VALUE}")
        if value is None:
            continue
        (heads, rank, plain), (others, width, inner) = query.get_shape(), value.get_shape()
        if (heads, rank) == (others, inner):
            del weights[key], weights[f"{stem}{_VALUE}"]
            weights[f"{stem}{_BOTH}"] = Turned([query, value], _both, (heads * (plain + width), rank))
    return weights


def _both(query: Tensor, value: Tensor) -> Tensor:
    return torch.cat((query.transpose(1, 2), value), 1).flatten(0, 1)
