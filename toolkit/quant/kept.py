"""Which expert stacks can stay as others stored them: in four bits whose values our storage holds without loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from toolkit.architecture import describe
from toolkit.checkpoint.conversion import targets
from toolkit.checkpoint.weights import Unread
from toolkit.errors import ModelError
from toolkit.parts import can_hold_four_bits, parsed_kind

__all__ = ["kept_stacks"]


def kept_stacks(name: str, model: PreTrainedModel, weights: Mapping[str, Any]) -> dict[str, str]:
    """Every expert stack by what it is stored in: as `FourBit.name` says where it is kept, int8 where it cannot be.

    Args:
        name: what errors call the checkpoint. model: on meta. weights: slices by key.

    Raises:
        ModelError: no stack can be kept.
    """
    parts: dict[str, list[Any]] = {}
    for key, target in targets(model, get_model_conversion_mapping(model), weights).items():
        parts.setdefault(target, []).append(weights[key])
    result, seen = {}, ""
    for layer in describe(model).layers:
        for stack in layer.stacks:
            pieces = parts.get(stack, [])
            kinds = {piece.four_bit if isinstance(piece, Unread) else None for piece in pieces}
            kind = kinds.pop() if len(kinds) == 1 else None
            inputs = model.get_parameter(stack).shape[1 if layer.is_transposed else 2]
            is_kept = kind is not None and can_hold_four_bits(inputs, parsed_kind(kind)[1])
            result[stack] = kind if kind is not None and is_kept else "int8"
            seen = seen or ", ".join(sorted({str(piece.get_dtype()) for piece in pieces}))
    if all(kind == "int8" for kind in result.values()):
        raise ModelError(
            f"{name}: its experts are stored as {seen or 'nothing known'}, which cannot be kept in four bits; set "
            "quantization.experts to int8 or int4"
        )
    return result
