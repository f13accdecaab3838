"""What a checkpoint is made of: every part's parameters and bytes, what becomes int8, what is adapted, what is left.

Read from the config and the safetensors headers alone, in a folder or on the Hub, so it costs no download of weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.files import METHOD, declared_format, gguf_at, here, stored_headers
from toolkit.parts import LINEAR_ROLES, Architecture
from toolkit.plan.stacks import bytes_of_stack

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["Audit", "Part", "audit", "parts_of"]

_INT8_ROLES = dict(zip(LINEAR_ROLES, ("attention", "shared experts", "dense layers"), strict=True))
_EXPERTS, _UNSEEN = "expert stacks", "expert stacks that text never reaches"


@dataclass(frozen=True)
class Part:
    """One kind of tensor: how many, parameters, bytes as int8 (with scales) or 16 bit, and whether LoRA reaches it.

    `source` counts the files' tensors by how they are stored there. `rounding` is the relative error that int8 adds to
    values spread as a Gaussian, None where nothing is rounded.
    """

    name: str
    tensors: int
    parameters: int
    stored: str
    bytes: int
    adapted: str
    source: Mapping[str, int] = field(default_factory=dict)
    rounding: float | None = None


@dataclass(frozen=True)
class Audit:
    """All parts of a model, and what its checkpoint's headers say: bytes on disk, dtypes, elements."""

    model: str
    moe_layers: int
    experts: int
    parts: tuple[Part, ...]
    checkpoint_bytes: int
    checkpoint_dtypes: tuple[str, ...]
    checkpoint_parameters: int

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        """In memory: int8 with its scales, the rest in 16 bit."""
        return sum(part.bytes for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        sizes = {"parameters": self.parameters, "bytes": self.bytes, "bytes_fp32": 4 * self.parameters}
        return {**asdict(self), **sizes, "bytes_bf16": 2 * self.parameters}


def audit(name_or_path: str, *, revision: str = "main") -> Audit:
    """Take stock of a checkpoint without loading it.

    Raises:
        ModelError: not an MoE, an unknown family or format, no safetensors there, or a shard is missing or damaged.
        HubError: the Hub cannot be reached, or has no such model for this user.
    """
    from toolkit.architecture import describe
    from toolkit.checkpoint.config import skeleton
    from toolkit.checkpoint.conversion import refuse_wrong_shapes
    from toolkit.checkpoint.remote import ask_hub

    if gguf_at(name_or_path) is None and not Path(name_or_path).exists():
        ask_hub(name_or_path, revision)
    model = skeleton(name_or_path, revision=revision)
    declared = declared_format(name_or_path, model.config)
    architecture = describe(model)
    tensors = stored_headers(name_or_path, revision)
    found: _Found = {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors}
    if declared is not None and declared["quant_method"] != METHOD:
        found = _multiplied_out(name_or_path, revision, declared, model)
    refuse_wrong_shapes(name_or_path, model, ((key, shape) for key, (shape, _) in found.items()))
    return Audit(
        model=name_or_path,
        moe_layers=len(architecture.layers),
        experts=sum(layer.num_experts for layer in architecture.layers),
        parts=parts_of(model, architecture, _by_parameter(model, found, declared), _kinds(architecture, declared)),
        checkpoint_bytes=sum(tensor.bytes for tensor in tensors),
        checkpoint_dtypes=tuple(sorted({tensor.dtype for tensor in tensors})),
        checkpoint_parameters=sum(math.prod(tensor.shape) for tensor in tensors),
    )


_Found = Mapping[str, tuple[tuple[int, ...], str]]
"""Weights of the files by key: shape, and how it is stored."""


def _multiplied_out(name: str, revision: str, declared: Mapping[str, Any], model: PreTrainedModel) -> _Found:
    """Of a checkpoint that others quantised; empty where its files are not here."""
    from toolkit.checkpoint.stacks import plain_weights, shapes_in

    folder = here(name, revision)
    weights = {} if folder is None else plain_weights(name, folder, declared, model)
    return shapes_in(weights)


def _kinds(architecture: Architecture, declared: Mapping[str, Any] | None) -> dict[str, str]:
    """What the stacks of one of our own checkpoints are in."""
    if declared is None or declared["quant_method"] != METHOD:
        return {}
    told = declared.get("stacks") or {}
    return {
        name: str(told.get(name, declared.get("experts", "int8")))
        for layer in architecture.layers
        for name in layer.stacks
    }


def _by_parameter(
    model: PreTrainedModel, found: _Found, declared: Mapping[str, Any] | None
) -> Mapping[str, Counter[str]]:
    """How the tensors that become a parameter are stored, counted."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    from toolkit.checkpoint.conversion import targets

    is_ours = declared is not None and declared["quant_method"] == METHOD
    names = targets(model, [] if is_ours else get_model_conversion_mapping(model), found)
    result: dict[str, Counter[str]] = {}
    for key, target in names.items():
        result.setdefault(target, Counter())[found[key][1]] += 1
    return result


def parts_of(
    model: nn.Module,
    architecture: Architecture,
    stored: Mapping[str, Counter[str]] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> tuple[Part, ...]:
    """Every parameter of `model` (meta is enough) in exactly one part.

    Args:
        stored: how the tensors of the files that become a parameter are stored, counted.
        kinds: expert stacks that are in four bits, with what they are in; others are int8.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    rows = {name: 2 if layer.is_transposed else 1 for layer in architecture.layers for name in layer.stacks}
    text, other = ([layer for layer in architecture.layers if layer.sees_text is sees] for sees in (True, False))
    groups = {_EXPERTS: [name for layer in text for name in layer.stacks]}
    groups[_UNSEEN] = [name for layer in other for name in layer.stacks]
    for role, title in _INT8_ROLES.items():
        groups[title] = [f"{name}.weight" for name in architecture.linear_names(role)]
    groups["routers"] = [f"{layer.router}.weight" for layer in text]
    taken = {name for names in groups.values() for name in names}
    groups["embeddings, head, norms and the rest"] = [name for name in shapes if name not in taken]
    return tuple(
        replace(_part(title, names, shapes, rows, kinds or {}), source=_sources(names, stored or {}))
        for title, names in groups.items()
        if names
    )


def _sources(names: list[str], stored: Mapping[str, Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for name in names:
        total.update(stored.get(name, {}))
    return dict(total)


def _part(
    title: str,
    names: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    rows: Mapping[str, int],
    kinds: Mapping[str, str],
) -> Part:
    parameters = sum(math.prod(shapes[name]) for name in names)
    adapted = "yes" if title in (_EXPERTS, "routers", "attention") else "no"
    if title in ("shared experts", "dense layers"):
        adapted = "with all-linear"
    if title not in (_EXPERTS, _UNSEEN, *_INT8_ROLES.values()):
        return Part(title, len(names), parameters, "16 bit", 2 * parameters, adapted)
    if four_bit := {kinds.get(name, "int8") for name in names} - {"int8"}:
        size = sum(
            bytes_of_stack(
                math.prod(shapes[name]), shapes[name][0] * shapes[name][rows[name]], kinds.get(name, "int8"), 2
            )
            for name in names
        )
        words = ", ".join(sorted(four_bit | ({"int8"} & {kinds.get(name, "int8") for name in names})))
        return Part(title, len(names), parameters, words, size, adapted)
    scales = sum(shapes[name][0] * shapes[name][rows[name]] if name in rows else shapes[name][0] for name in names)
    rounding = _rounding(parameters // max(1, scales))
    return Part(title, len(names), parameters, "int8", parameters + 4 * scales, adapted, rounding=rounding)


def _rounding(width: int) -> float:
    """Relative error of int8 with a scale for `width` values of a Gaussian: a step over the root of 12.

    The largest of n is taken to lie where 1/(2n) of the curve is beyond it on either side.
    """
    largest = NormalDist().inv_cdf(1 - 1 / (4 * max(1, width)))
    return largest / 127 / math.sqrt(12)
