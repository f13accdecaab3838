"""Writes a merged checkpoint parameter by parameter, in another program's keys and dtypes, and reads it back.

`save_pretrained` wants the whole model in memory. Here a shard is written when it is full, and at most one layer of the
base, one parameter in fp32 and one shard are alive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from toolkit.adapters.layouts import Factors, Piece, pieces
from toolkit.architecture import describe
from toolkit.checkpoint.files import write_index
from toolkit.checkpoint.formats.gguf_names import original_names
from toolkit.errors import ModelError
from toolkit.export.merge import merged_parameters
from toolkit.families import VLLM_WANTS_EXPERTS
from toolkit.quant.source import SourceWeights

__all__ = ["ReadBack", "Shard", "Splits", "difference"]

_SHARD = 1 << 30
"""Bytes."""
_AT_ONCE = 16
"""Rows, or experts, that are compared at a time."""
_NOT_APART = "no loader was seen to take rounded ones apart: export as merged"


class Splits:
    """Which tensors of the family's own files each parameter becomes.

    Raises:
        ModelError: experts or parameters that the files do not hold by themselves.
    """

    def __init__(self, model: PreTrainedModel, format: str) -> None:
        self._model, self._original = model, original_names(model)
        self.stacks: dict[str, list[Piece]] = {}
        for layer in describe(model).layers:
            for name in layer.stacks:
                found = pieces(_empty(name, model.get_parameter(name), layer.is_transposed), model)
                if not found or any(piece.is_turned for piece in found):
                    raise ModelError(
                        f"{format}: this family's files hold all experts of a layer in one tensor, {name}, and "
                        f"{VLLM_WANTS_EXPERTS.get(str(model.config.model_type), _NOT_APART)}"
                    )
                self.stacks[name] = found
        self.is_transposed = {n for layer in describe(model).layers if layer.is_transposed for n in layer.stacks}

    def of(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """By key, one expert after the other; `value` is the parameter, or its like on meta."""
        if name not in self.stacks:
            if name not in self._original:
                raise ModelError(f"{name}: the family's files store it together with others: export as merged")
            yield self._original[name], value
            return
        for piece in self.stacks[name]:
            matrix = value[piece.expert].T if name in self.is_transposed else value[piece.expert]
            yield piece.key, matrix[piece.rows]


def _empty(name: str, parameter: Tensor, is_transposed: bool) -> Factors:
    """An update of rank 0: what tells how a stack is split asks an update for its shape."""
    experts, outputs, inputs = parameter.shape
    outputs, inputs = (inputs, outputs) if is_transposed else (outputs, inputs)
    return Factors(
        name, name, torch.empty(experts, 0, inputs), torch.empty(experts, outputs, 0), 1.0, is_transposed, True
    )


class Shard:
    """Collects tensors and writes them to files of some size each; `close` writes the rest, and the index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: dict[str, Tensor] = {}
        self._places: dict[str, str] = {}
        self.sizes: Counter[torch.dtype] = Counter()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Tensors by key, which are not to be changed any more."""
        for key, tensor in tensors.items():
            self._waiting[key] = tensor.contiguous()
            self.sizes[tensor.dtype] += tensor.nbytes
        if sum(tensor.nbytes for tensor in self._waiting.values()) >= _SHARD:
            self._write()

    def _write(self) -> None:
        file = f"model-{len(set(self._places.values())) + 1:05}.safetensors"
        save_file({key: self._waiting[key] for key in sorted(self._waiting)}, self._folder / file, {"format": "pt"})
        self._places |= dict.fromkeys(self._waiting, file)
        self._waiting = {}

    def close(self) -> None:
        """Write what is left."""
        if self._waiting:
            self._write()
        write_index(self._folder, self._places, self.sizes.total())


def difference(
    base: Path, adapter: Sequence[Factors], read: Callable[[str], Any], allowed: Callable[[str, Tensor], float]
) -> float:
    """Merge once more and compare every parameter with what is read; the worst as a part of what is allowed.

    Args:
        read: a parameter by name. allowed: how far a parameter may be off, by its name and merged values.
    """
    worst = 0.0
    for name, wanted in merged_parameters(SourceWeights(str(base)), adapter):
        if wanted.is_floating_point() and wanted.numel():  # some have a width of 0
            found, most = read(name), max(allowed(name, wanted), 1e-30)
            for some, there in zip(wanted.split(_AT_ONCE), found.split(_AT_ONCE), strict=True):
                off = float((there.float() - some).abs_().max()) / most
                worst = max(worst, off if off == off else float("inf"))
    return worst


class ReadBack:
    """Parameters of a written checkpoint by name, through our own reader; one layer of it is alive."""

    def __init__(self, folder: Path) -> None:
        self._source, self._stack = SourceWeights(str(folder)), ExitStack()
        self._part_of = {name: part for part, names in self._source.parts().items() for name in names}
        self._part, self._layer = "", dict[str, Tensor]()

    def __call__(self, name: str) -> Tensor:
        """As it is read, in a dtype of floats."""
        if (part := self._part_of[name]) != self._part:
            self.close()
            self._part, self._layer = part, self._stack.enter_context(self._source.layer(part))
        return self._layer[name]

    def close(self) -> None:
        """Let go of the layer."""
        self._layer = {}
        self._stack.close()
