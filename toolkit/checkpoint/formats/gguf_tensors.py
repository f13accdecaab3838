"""The tensors of a GGUF file that each parameter of a model becomes: what llama.cpp's converter does to it.

The other way round of `gguf_names`, by the same table and the same rows of `toolkit/architecture.py`. What is put into
another order here is found by sending row numbers through the function that puts it back.
Source: `conversion/` of llama.cpp (in llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolkit.architecture import describe
from toolkit.checkpoint.formats.gguf_names import (
    CHOOSING,
    FROM_ONE,
    TILED,
    name_table,
    original_names,
    rotated_heads,
    spellings,
)
from toolkit.checkpoint.formats.gguf_undo import ValueHeads, halves
from toolkit.errors import ModelError
from toolkit.families import GGUF_NORMS_FROM_ONE, GGUF_TILED_VALUE_HEADS

__all__ = ["GgufNames", "InFile"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class InFile:
    """Rows of a tensor of the file, from `row` on; all of it where no other parameter lies in it. `value` has their
    numbers, or is on meta."""

    name: str
    value: Tensor
    row: int = 0


class GgufNames:
    """Makes the file's tensors of a model's parameters.

    Args:
        model: on meta. architecture: llama.cpp's name of it. where: what errors call it.
        there: the shapes of a file that is to be matched, by name; without it, names are the converter's.
    """

    def __init__(
        self, model: PreTrainedModel, architecture: str, where: str, there: Mapping[str, Shape] | None = None
    ) -> None:
        self.model, self.architecture, self.where, self._there = model, architecture, where, there
        self._config = model.config.get_text_config()
        self._layers = describe(model).layers
        self._original = original_names(model)
        self._table = name_table(architecture, where)
        tied = set(model.all_tied_weights_keys or {})
        self.wanted = {name: value for name, value in model.state_dict().items() if name not in tied}

    def tensors(self, name: str, value: Tensor) -> list[InFile]:
        """What parameter `name` becomes, `value` being its numbers in any floating-point dtype, or on meta.

        Raises:
            ModelError: the library has no name for it, or the file that is to be matched holds it in another form.
        """
        ways = (self._experts, self._router, self._latent, self._linear_attention, self._fused, self._joined, self._one)
        made = next((made for way in ways if (made := way(name, value)) is not None), None)
        if not made:
            self._refuse(name)
        for part in made:
            shape = None if self._there is None else self._there.get(part.name)
            if self._there is not None and (shape is None or shape[1:] != tuple(part.value.shape[1:])):
                self._refuse(name)
        return made

    def _refuse(self, name: str) -> NoReturn:
        if self._there is None:
            raise ModelError(
                f"gguf-merged: the gguf library has no name for {name} in a {self.architecture} file: give a GGUF file "
                "of the base with --base-gguf, or export as merged"
            )
        raise ModelError(f"{self.where}: holds {name} in no form that can be written: export as merged")

    def _has(self, *names: str) -> bool:
        return self._there is not None and all(name in self._there for name in names)

    def _experts(self, name: str, value: Tensor) -> list[InFile] | None:
        for layer in self._layers:
            for stack in layer.stacks:
                if name not in (stack, f"{stack}_bias"):
                    continue
                kind, block = ("bias" if name.endswith("_bias") else "weight"), _block(name)
                module = self.model.get_submodule(layer.name)
                rows = value.transpose(1, 2) if layer.is_transposed and kind == "weight" else value
                if stack == layer.stacks[-1] or not module.has_gate:
                    which = "down" if stack == layer.stacks[-1] else "up"
                    return [InFile(f"{block}ffn_{which}_exps.{kind}", rows)]
                joined = bool(getattr(module, "is_concatenated", True))
                gate, up = rows.chunk(2, dim=1) if joined else (rows[:, ::2], rows[:, 1::2])
                if self._has(both := f"{block}ffn_gate_up_exps.{kind}"):
                    return [InFile(both, torch.cat([gate, up], dim=1))]
                return [InFile(f"{block}ffn_gate_exps.{kind}", gate), InFile(f"{block}ffn_up_exps.{kind}", up)]
        return None

    def _router(self, name: str, value: Tensor) -> list[InFile] | None:
        leaf = name.rpartition(".")[2]
        if any(name.startswith(f"{layer.router}.") for layer in self._layers) and leaf in ("weight", "bias"):
            return [self._shaped(name, f"{_block(name)}ffn_gate_inp.{leaf}", value)]
        for pattern, places in CHOOSING.items():
            if re.search(pattern, name):
                names = [f"{_block(name)}{place}" for place in places]
                return [self._shaped(name, next(filter(self._has, names), names[0]), value)]
        return None

    def _latent(self, name: str, value: Tensor) -> list[InFile] | None:
        block = _block(name)
        if not name.endswith(".kv_b_proj.weight") or self._has(f"{block}attn_kv_b.weight"):
            return None
        heads = value.unflatten(0, (self._config.num_attention_heads, -1))
        keys, values = heads.split([self._config.qk_nope_head_dim, self._config.v_head_dim], dim=1)
        return [InFile(f"{block}attn_k_b.weight", keys.transpose(1, 2)), InFile(f"{block}attn_v_b.weight", values)]

    def _linear_attention(self, name: str, value: Tensor) -> list[InFile] | None:
        leaf = name.rpartition(".linear_attn.")[2]
        if leaf == name:
            return None
        heads, block = ValueHeads.of(self._config), _block(name)
        if leaf == "in_proj_qkvz.weight":
            each = [heads.key_size, heads.key_size, *[heads.per_key * heads.value_size] * 2]
            q, k, v, z = (part.flatten(0, 1) for part in value.unflatten(0, (heads.keys, -1)).split(each, dim=1))
            return [InFile(f"{block}attn_qkv.weight", torch.cat([q, k, v])), InFile(f"{block}attn_gate.weight", z)]
        if self.architecture not in GGUF_TILED_VALUE_HEADS or heads.per_key == 1 or leaf not in TILED:
            return None
        place, undo = TILED[leaf]
        if leaf == "out_proj.weight":
            rows = _before(value.T, lambda numbers: heads.of_values(numbers)).T
        else:
            rows = _before(value, partial(undo, heads))
        return [self._shaped(name, f"{block}{place}", rows)]

    def _fused(self, name: str, value: Tensor) -> list[InFile] | None:
        """What is one parameter here and several tensors there."""
        block = _block(name)
        if name.endswith(".conv1d.weight") and self._has(*(f"{block}ssm_conv1d_{which}.weight" for which in "qkv")):
            names = [f"{block}ssm_conv1d_{which}.weight" for which in "qkv"]
            return [self._shaped(name, key, part) for key, part in zip(names, value.chunk(3), strict=True)]
        if not name.endswith((".input_linear.weight", ".gate_up_proj.weight")):
            return None
        kind = "" if self._has(f"{block}ffn_gate.weight") else "_shexp"
        gate, up = value.chunk(2)
        return [InFile(f"{block}ffn_gate{kind}.weight", gate), InFile(f"{block}ffn_up{kind}.weight", up)]

    def _joined(self, name: str, value: Tensor) -> list[InFile] | None:
        """A query, key or value whose rows lie in one tensor with the others'."""
        match = re.search(r"^(.*\.)([qkv])_proj\.(weight|bias)$", name)
        if match is None or not self._has(whole := f"{_block(name)}attn_qkv.{match[3]}"):
            return None
        before = "qkv"[: "qkv".index(match[2])]
        row = sum(self.wanted[f"{match[1]}{which}_proj.{match[3]}"].shape[0] for which in before)
        return [InFile(whole, self._in_pairs(f"attn_{match[2]}.{match[3]}", value), row)]

    def _one(self, name: str, value: Tensor) -> list[InFile] | None:
        for spelled in spellings(name, self._original):
            known = self._table.get_name(spelled, (".weight", ".bias"))
            if known is None:
                continue
            known = known.replace("blk.0.", _block(name))
            names = [known, f"{known}.weight", f"{known}.bias"]
            if self._there is None:
                return [self._shaped(name, names[1] if name.endswith("sinks") else known, value)]
            if (found := next(filter(self._has, names), None)) is not None:
                return [self._shaped(name, found, value)]
        return None

    def _shaped(self, name: str, key: str, value: Tensor) -> InFile:
        """One tensor, with what is done to those of its kind."""
        leaf = re.sub(r"^blk\.\d+\.", "", key)
        if self.architecture in GGUF_NORMS_FROM_ONE and re.search(FROM_ONE, leaf):
            value = value.float() + 1
        if name.endswith("A_log"):
            value = -value.float().exp()
        value = self._in_pairs(leaf, value)
        shape = (self._there or {}).get(key)
        if shape is None:
            shape = tuple(size for size in value.shape if size != 1) or (1,)
        return InFile(key, value.reshape(shape) if value.shape.numel() == torch.Size(shape).numel() else value)

    def _in_pairs(self, leaf: str, value: Tensor) -> Tensor:
        heads = rotated_heads(self._config, leaf)
        return value if heads is None else _before(value, lambda numbers: halves(numbers, heads))

    def every(self) -> Iterator[tuple[str, list[InFile]]]:
        """All of the model's parameters on meta."""
        for name, value in self.wanted.items():
            yield name, self.tensors(name, value)


def _before(value: Tensor, undo: Callable[[Tensor], Tensor]) -> Tensor:
    """The rows that `undo`, which only reorders rows, makes `value` of."""
    order = undo(torch.arange(len(value)))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return value if value.device.type == "meta" else value[place]


def _block(name: str) -> str:
    match = re.search(r"\.(\d+)\.", name)
    return f"blk.{match[1]}." if match else ""
