"""Logits of a GGUF file as ggml computes them on a CPU, which rounds the inputs of its matrix products too.

ggml multiplies whole numbers. So it rounds the rows that go into a product to eight bits, in blocks that the type of
the weight asks for (`vec_dot_type` in its ggml-cpu.c). onecard multiplies rows in fp32 with a weight multiplied out;
here its reading of a file rounds those rows as ggml does. What is looked up, as an embedding is, or stored in fp32, as
routers and norms are, is left alone. Latent attention is computed as llama.cpp does it, without keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask

from toolkit.architecture import auto_class
from toolkit.checkpoint.gguf_source import opened
from toolkit.quant.gptq.observe import Batch
from toolkit.quant.source import SourceWeights

__all__ = ["as_ggml_rounds", "rounded_logits"]

_LATENT = "onecard_latent"
"""The name under which transformers knows latent attention as llama.cpp computes it."""
_PRODUCTS = ("linear", "matmul", "__matmul__")
_WITH_MINIMA = ("Q4_1", "Q5_1")
"""Types whose values are step · code + minimum, with both in fp16 at the start of a block."""


def _in_blocks_of_32(rows: Tensor) -> Tensor:
    """Q8_0, and Q8_1 but for its sums: codes of ±127 with a scale in fp16."""
    blocks = rows.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(largest == 0, 0, 127 / largest)).round()
    return (codes * (largest / 127).half().float()).flatten(-2)


def _in_blocks_of_256(rows: Tensor) -> Tensor:
    """Q8_K: codes of ±127 with a scale in fp32, whose sign makes the largest value -127."""
    blocks = rows.unflatten(-1, (-1, 256))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = torch.where(largest == 0, 0, -127 / largest)
    codes = (blocks * scale).round().clamp(max=127)
    return (codes * torch.where(scale == 0, 0, 1 / scale)).flatten(-2)


def _sums_off(rows: Tensor) -> Tensor:
    """How far the sums of Q8_1's blocks, stored in fp16 for the minima, are off: at each block's start, else zero."""
    blocks = rows.unflatten(-1, (-1, 32))
    rounded, scale = _in_blocks_of_32(rows).unflatten(-1, (-1, 32)), blocks.abs().amax(-1) / 127
    codes = torch.where(scale == 0, 0, rounded.sum(-1) / scale.half().float()).round()
    off = torch.zeros_like(blocks)
    off[..., 0] = (codes * scale).half().float() - rounded.sum(-1)
    return off.flatten(-2)


_ROUNDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda rows: rows,
    "F16": lambda rows: rows.half().float(),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), _in_blocks_of_32),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), _in_blocks_of_256),
}


def as_ggml_rounds(rows: Tensor, kind: str) -> Tensor:
    """Rows [..., I] in fp32 as they go into a product with a weight of this type, by ggml's name of it."""
    return _ROUNDS[kind](rows)


@dataclass
class _Matrix:
    """A parameter: the type that its inputs are rounded for, and its tensors' minima [..., O, I], where they have some.

    `others` are the rows of further types, all other rows being zero, which are zero in the parameter then.
    """

    kind: str
    minima: Tensor | None
    others: Mapping[str, Tensor]
    is_met: bool = False


class _Rounding(TorchFunctionMode):
    """Rounds the other side of every product with a matrix that is known by the place of its storage."""

    def __init__(self, known: Mapping[int, _Matrix]) -> None:
        super().__init__()
        self._known = known

    def _matrix(self, operand: Any) -> _Matrix | None:
        found = self._known.get(operand.untyped_storage().data_ptr()) if isinstance(operand, Tensor) else None
        if found:
            found.is_met = True
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        left, right, *rest = args
        if (matrix := self._matrix(right)) is not None:
            made = func(as_ggml_rounds(left, matrix.kind), right, *rest, **(kwargs or {}))
            for kind, rows in matrix.others.items():
                made = made + as_ggml_rounds(left, kind) @ rows.T
            return made if matrix.minima is None else made + _sums_off(left) @ matrix.minima.T
        if (matrix := self._matrix(left)) is not None:
            right = as_ggml_rounds(right.mT, matrix.kind).mT
        return func(left, right, *rest, **(kwargs or {}))


@torch.no_grad()
def rounded_logits(file: Path, batch: Batch) -> Tensor:
    """Logits [T, V] of a GGUF file in fp32, with inputs rounded as ggml rounds them, for the real tokens.

    Raises:
        RuntimeError: a matrix went into no product that is known here, or is a stack of types that are not.
    """
    with _whole(file) as model, ExitStack() as stack:
        matrices = _matrices(file, model)
        for name, kinds in _latent(file).items():
            stack.enter_context(_remembered(model.get_submodule(name.removesuffix(".weight")), kinds))
            model.set_attn_implementation(_LATENT)
        with _Rounding({model.get_parameter(name).untyped_storage().data_ptr(): matrices[name] for name in matrices}):
            logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits
    if missed := [name for name, matrix in matrices.items() if not matrix.is_met]:
        raise RuntimeError(f"{file}: {missed[0]} went into no product that is known here")
    return logits.flatten(0, 1)[batch.real].float()


@contextmanager
def _whole(file: Path) -> Iterator[PreTrainedModel]:
    """The model with all its weights, multiplied out to fp32."""

    def without_weights(config: PretrainedConfig) -> PreTrainedModel:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto_class(config).from_config(config)
        return model

    weights = SourceWeights(str(file), model_of=without_weights)
    model = weights.model.eval()
    model.set_experts_implementation("eager")
    with ExitStack() as stack:
        for name in weights.parts():
            stack.enter_context(weights.layer(name))
            model.get_submodule(name).float()
        model.tie_weights()
        yield model


def _matrices(file: Path, model: PreTrainedModel) -> dict[str, _Matrix]:
    """By parameter; without floats, embeddings that are looked up alone, and latent attention's."""
    found, made = opened(file), {}
    looked_up, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    for name, packed in found.weights.items():
        kinds = {found.file.tensors[part.key].kind for part in packed.parts.values()}
        if kinds == {"F32"} or name in _latent(file):
            continue
        parameter, first = model.get_parameter(name), min(kinds)
        if parameter is looked_up and head.weight is not looked_up:
            continue
        alike = tuple(kind for kind in kinds if _ROUNDS[kind] is _ROUNDS[first])
        others = {kind: _of_kinds(file, name, (kind,)) for kind in kinds.difference(alike)}
        if others:
            parameter.copy_(_of_kinds(file, name, alike))
        minima = _of_kinds(file, name, _WITH_MINIMA, only_minima=True) if kinds & {*_WITH_MINIMA} else None
        if parameter.dim() > 2 and (others or minima is not None):
            raise RuntimeError(f"{file}: {name} is a stack of {', '.join(sorted(kinds))}, which is not known here")
        made[name] = _Matrix(first, minima, others)
    return made


def _of_kinds(file: Path, name: str, kinds: tuple[str, ...], *, only_minima: bool = False) -> Tensor:
    """A parameter with zeros for what is of other types, or with all its codes 0."""
    found, parts = opened(file), {}
    for which, part in found.weights[name].parts.items():
        raw, kind = found.slices[part.key][...], found.file.tensors[part.key].kind
        parts[which] = torch.zeros_like(raw)
        if kind in kinds and only_minima:
            size = 20 if kind == "Q4_1" else 24
            parts[which].unflatten(-1, (-1, size))[..., 2:4] = raw.unflatten(-1, (-1, size))[..., 2:4]
        elif kind in kinds:
            parts[which] = raw
    return found.weights[name].unpack(parts)


def _latent(file: Path) -> dict[str, dict[str, str]]:
    """The second projection of every latent attention, with the types of what it is made of."""
    found = opened(file)
    return {
        name: {which: found.file.tensors[part.key].kind for which, part in packed.parts.items()}
        for name, packed in found.weights.items()
        if packed.parts.keys() == {"keys", "values"}
    }


@contextmanager
def _remembered(projection: nn.Module, kinds: Mapping[str, str]) -> Iterator[None]:
    """The rows that latent attention's second projection is given stay there, for `_latent_attention`."""

    def remember(module: nn.Module, args: tuple[Tensor]) -> None:
        module.__dict__["latent"] = args[0], kinds

    handle = projection.register_forward_pre_hook(remember)
    try:
        yield
    finally:
        handle.remove()


def _latent_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of queries [B, heads, T, D] to the latent rows [B, T, R] that keys and values are made of.

    llama.cpp takes a query to those rows, and what it finds there from them: these two products' inputs are rounded.
    """
    rows, kinds = module.kv_b_proj.latent
    of_values = module.kv_b_proj.weight.unflatten(0, (query.shape[1], -1))[:, -value.shape[-1] :]
    plain = len(module.kv_b_proj.weight) // query.shape[1] - value.shape[-1]
    query = torch.cat([as_ggml_rounds(query[..., :plain], kinds["keys"]), query[..., plain:]], dim=-1)
    scores = query @ key.mT * scaling + (0 if attention_mask is None else attention_mask)
    found = scores.softmax(-1) @ rows.reshape(len(query), 1, query.shape[2], -1)
    return (as_ggml_rounds(found, kinds["values"]) @ of_values.mT).transpose(1, 2).contiguous(), None


AttentionInterface.register(_LATENT, _latent_attention)
AttentionMaskInterface.register(_LATENT, eager_mask)
