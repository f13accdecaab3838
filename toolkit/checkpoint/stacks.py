"""Expert stacks under names that a family's own key conversions do not know: put together from what the files hold.

Quantisers rename experts (llm-compressor splits any fused stack, and writes Mixtral's under names of its own), MLX and
GGUF stack each projection. transformers would leave such experts random, with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from toolkit.architecture import describe
from toolkit.checkpoint.conversion import Shards, targets
from toolkit.checkpoint.files import GGUF
from toolkit.checkpoint.mlx_layout import published
from toolkit.checkpoint.weights import StackSlice, unread
from toolkit.parts import ExpertLayer

__all__ = ["fitted", "plain_weights", "shapes_in"]

_ROLES = {
    **dict.fromkeys(("gate_proj", "w1", "gate"), "gate"),
    **dict.fromkeys(("up_proj", "w3", "up"), "up"),
    **dict.fromkeys(("down_proj", "w2", "down"), "down"),
    "gate_up_proj": "both",
}
_NAME = re.compile(
    rf"\.(\d+)\.(?:[^.]+\.)*?(?:experts|switch_mlp)\.(?:(\d+)\.)?(?:switch_mlp\.)?({'|'.join(_ROLES)})"
    r"(?:s\.(\d+))?(?:\.(weight|bias)|(_bias))?$"
)
_INNER = ".router.linear."
"""A linear that Unsloth has inside gpt-oss' router."""


def plain_weights(
    name: str, folder: Path, declared: Mapping[str, Any] | None, model: PreTrainedModel, *, keyed: bool = False
) -> dict[str, Any]:
    """Every weight of a checkpoint, unread, under the names of a plain one where others quantised it.

    Args:
        name: what errors call it. folder: as `fetch` gives it. model: on meta.
        declared: its quantization_config, None where it is plain.
        keyed: plain tensors too as `PackedSlice`, which says where in the files it lies.

    Raises:
        ModelError: a part of a weight is missing, or a scheme is unknown.
    """
    if (declared or {}).get("quant_method") == GGUF:
        from toolkit.checkpoint.gguf_source import gguf_weights

        return dict(gguf_weights(folder))  # under the model's own names, whole and checked
    with Shards(name, folder, declared) as shards:
        # safetensors keeps a file mapped as long as a slice of it lives.
        slices = {key: shards.slice(key) for key in shards.keys}
        if keyed:
            slices = {key: unread(part, key) for key, part in slices.items()}
    if (declared or {}).get("quant_method") == "mlx":
        slices = published(slices, model)
    return fitted(slices, model, get_model_conversion_mapping(model), are_halves=_are_halves(declared or {}))


def _are_halves(declared: Mapping[str, Any]) -> bool:
    """Whether GPTQModel cut the stacks: halves of a gpt-oss expert are called gate and up, whose rows are by turns."""
    meta = declared.get("meta")
    told = meta.get("quantizer") if isinstance(meta, Mapping) else None
    return declared.get("quant_method") == "gptq" and "gptqmodel" in str(told).lower()


def shapes_in(weights: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Of slices by key: each weight's shape, and what it is stored in."""
    return {key: (tuple(weight.get_shape()), str(weight.get_dtype())) for key, weight in weights.items()}


def fitted(
    weights: Mapping[str, Any], model: PreTrainedModel, mapping: Iterable[Any], *, are_halves: bool = False
) -> dict[str, Any]:
    """Slices by key, where those that become no parameter of the model but are parts of its stacks are put together.

    Args:
        mapping: the family's key conversions. are_halves: what is called gate and up are the first and the second
            half of the rows, also where the family has them by turns.
    """
    known, mapping = model.state_dict().keys(), list(mapping)
    names = targets(model, mapping, weights)
    if inner := [key for key, target in names.items() if _INNER in key and target not in known]:
        weights = {key.replace(_INNER, ".router.") if key in inner else key: part for key, part in weights.items()}
        names = targets(model, mapping, weights)
    unknown = {key: match for key, target in names.items() if target not in known and (match := _NAME.search(key))}
    if not unknown:
        return dict(weights)
    layers = {int(re.findall(r"\.(\d+)\.", layer.name)[-1]): layer for layer in describe(model).layers}
    parts: dict[tuple[int, str], dict[tuple[str, int], str]] = {}
    for key, match in unknown.items():
        kind = "bias" if match[5] == "bias" or match[6] else "weight"
        number = match[2] or match[4]  # the second as Unsloth has it for gpt-oss: experts.down_projs.3
        parts.setdefault((int(match[1]), kind), {})[_ROLES[match[3]], int(number or -1)] = key
    result = dict(weights)
    for (number, kind), found in parts.items():
        if number not in layers or any(stack in names.values() for stack in _names(layers[number], kind)):
            continue
        pieces = {place: weights[key] for place, key in found.items()}
        made = _stacks(layers[number], model, pieces, kind, are_halves)
        if made:
            result = {key: part for key, part in result.items() if key not in found.values()} | made
    return result


def _names(layer: ExpertLayer, kind: str) -> tuple[str, str]:
    up, down = layer.stacks
    return (f"{up}_bias", f"{down}_bias") if kind == "bias" else (up, down)


def _stacks(
    layer: ExpertLayer, model: PreTrainedModel, parts: Mapping[tuple[str, int], Any], kind: str, are_halves: bool
) -> dict[str, StackSlice]:
    """Both stacks of a layer by name; none where a part of an expert is missing."""
    is_joined = are_halves or bool(getattr(model.get_submodule(layer.name), "is_concatenated", True))
    inputs = ("both",) if any(role == "both" for role, _ in parts) else ("gate", "up")
    if not any(role == "gate" for role, _ in parts) and inputs != ("both",):
        inputs = ("up",)
    up, down = _names(layer, kind)
    result = {}
    for name, roles in ((up, inputs), (down, ("down",))):
        experts = [[_expert(parts, role, number) for role in roles] for number in range(layer.num_experts)]
        if any(piece is None for expert in experts for piece in expert):
            return {}
        is_bias = kind == "bias"
        result[name] = StackSlice(
            experts, is_concatenated=is_joined, is_transposed=layer.is_transposed and not is_bias, is_bias=is_bias
        )
    return result


def _expert(parts: Mapping[tuple[str, int], Any], role: str, number: int) -> Any:
    """One expert's own tensor, or its place in the tensor of all of them."""
    if (whole := parts.get((role, -1))) is not None:
        return unread(whole)[number : number + 1] if number < whole.get_shape()[0] else None
    return parts.get((role, number))
