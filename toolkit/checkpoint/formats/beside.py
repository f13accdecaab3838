"""What may lie beside the parts of a quantised weight: its sizes, its bias, scales of activations. All else is refused.

A rotation of the inputs, a correction or a second factor that a reader does not know would change what a layer computes
without a word. Some formats have them as tensors, some in the quantization_config alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from toolkit.checkpoint.formats.hqq import BESIDE_HQQ
from toolkit.checkpoint.formats.packed import Files, Packed

__all__ = ["BESIDE_PACKED", "OF_ACTIVATIONS", "refuse_changed_inputs", "refuse_unknown_parts"]

BESIDE_PACKED = (
    *("weight_shape", "weight_g_idx", "weight_format", "input_scale", "input_global_scale", "act_scale"),
    *("activation_scale", "input_scale_ub", *BESIDE_HQQ),
)
"""Tensors of a quantised module that its values do not need."""

OF_ACTIVATIONS = re.compile(
    r"(?:^|[._])(?:[kqv]|kv|kv_cache|prob|input|output|act|activation)"
    r"_(?:(?:global_|per_tensor_)?(?:scales?|zero_point|max)|scale_ub|scale_inv|g_idx)$"
)
"""Names of what says how activations and caches are quantised."""

_IN_WEIGHTS = ("weight_input", "weight_output")
"""Where compressed-tensors has multiplied a transform into the weights themselves, for good."""


def refuse_changed_inputs(files: Files) -> None:
    """Refuse a quantization_config that has inputs or outputs of layers transformed at run time.

    compressed-tensors says so in `transform_config`, auto-round in `rotation_config`, Quark in `algo_config`. Weights
    that are stored rotated are right only with that.

    Raises:
        ModelError: it does.
    """
    for name, why in _changes(files.declared):
        raise files.not_read(name, f"the quantization_config says {why}")


def _changes(declared: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if transforms := declared.get("transform_config"):
        groups = transforms.get("config_groups") if isinstance(transforms, Mapping) else None
        for name, group in groups.items() if isinstance(groups, Mapping) else [("transform_config", None)]:
            places = group.get("apply") if isinstance(group, Mapping) else None
            for place in places if isinstance(places, list) else [None]:
                at = place.get("location") if isinstance(place, Mapping) else None
                if at not in _IN_WEIGHTS:
                    yield "transform_config", f"a transform {name!r} of activations, at {at!r}"
    if declared.get("rotation_config"):
        yield "rotation_config", "a rotation of the inputs"
    algorithms = declared.get("algo_config")
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        name = str(algorithm.get("name") if isinstance(algorithm, Mapping) else algorithm)
        if "rot" in name.lower():
            yield "algo_config", f"a rotation, {name!r}"


def refuse_unknown_parts(files: Files, found: Mapping[str, Packed]) -> None:
    """Refuse tensors of a quantised module that are no part of its weight and are not known to leave it as it is.

    Args:
        found: weights by name.

    Raises:
        ModelError: there is one.
    """
    taken = {part.key for weight in found.values() for part in weight.parts.values()} | found.keys()
    modules = {name.removesuffix(".weight") for name in found}
    for key in files.headers:
        if key in taken:
            continue
        rest = _beside(key, modules)
        if rest is not None and not (rest in BESIDE_PACKED or rest == "bias" or OF_ACTIVATIONS.search(rest)):
            raise files.not_read(key, f"a part of a quantised module, {rest!r}")


def _beside(key: str, modules: set[str]) -> str | None:
    """What a key has after the name of a quantised module, or of a stack; None where it is of none of them.

    What lies inside a weight (`weight.absmax`) is its format's own affair.
    """
    at, _, leaf = key.rpartition(".")
    path, words = at.split("."), leaf.split("_")
    ends = [(".".join(path[:count]), ".".join((*path[count:], leaf))) for count in range(len(path), 0, -1)]
    ends += [(f"{at}.{'_'.join(words[:count])}", "_".join(words[count:])) for count in range(len(words) - 1, 0, -1)]
    rest = next((rest for name, rest in ends if name in modules), None)
    return None if rest is None or rest.startswith("weight.") else rest
