"""One conversion operation that rounds weights to int8 expert by expert, as they come out of the checkpoint's files.

transformers would build a whole float stack first, and cast it to the compute dtype before that: several layers' worth
of memory. Here a family's own chain of operations (merge experts, concatenate gate and up) runs inside ours, on one
expert at a time, over tensors that are still pages of the mapped file, or packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist
from transformers.integrations.bitsandbytes import Bnb8bitQuantize

from toolkit.architecture import is_experts
from toolkit.checkpoint.weights import Unread
from toolkit.ops.int8 import quantize, scratch_for
from toolkit.quant.ahead import ReadAhead
from toolkit.quant.requantised import Requantised
from toolkit.steps import advance

__all__ = ["Round", "Workspace", "is_int8"]

Tensors = dict[str, Any]


@dataclass
class Workspace:
    """What all roundings of one load share.

    Results are allocated before the first tensor is read and scratch memory is reused: a result that lands between two
    short-lived tensors keeps the heap from shrinking, which came to 20% of the model.

    Args:
        device: where the results go; each expert is sent there before it is rounded.
    """

    device: Any = "cpu"
    requantised: Requantised = field(default_factory=Requantised)
    _results: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _scratch: torch.Tensor | None = None
    _expected: dict[int, list[Any]] = field(default_factory=dict)
    _ahead: ReadAhead | None = None
    _rounded: int = 0
    _due: int = 0

    def reserve(self, model: nn.Module) -> None:
        """Allocate every int8 parameter of a model on meta; nothing is touched yet."""
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if is_int8(module, name):
                    self._results[f"{module_name}.{name}"] = self._new(parameter, getattr(module, f"{name}_scale"))
                    self._due += parameter.numel()

    def has_reserved(self, name: str) -> bool:
        """Whether a parameter, int8 or the scales of one, is allocated and not filled yet."""
        return name in self._results or name.removesuffix("_scale") in self._results

    def result(self, model: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The int8 tensor and scales to fill for a parameter."""
        reserved = self._results.pop(name, None)
        return reserved or self._new(model.get_parameter(name), model.get_parameter(f"{name}_scale"))

    def expect(self, reader: Round, source: Any) -> None:
        """A tensor of the files that `reader` will read; readers have their turns in their first tensors' order."""
        self._expected.setdefault(id(reader), []).append(source)

    def used(self, tensors: Tensors) -> None:
        """These have been read, and what was expected meanwhile may be fetched in their place."""
        if self._expected:
            self._ahead = ReadAhead(source for sources in self._expected.values() for source in sources)
            self._expected = {}
        if self._ahead is not None:
            self._ahead.used(sum(part.nbytes for parts in tensors.values() for part in parts))

    def saw(self, tensors: Tensors) -> bool:
        """Count what of this is packed; whether any is."""
        found = [part for parts in tensors.values() for part in parts if isinstance(part, Unread)]
        self.requantised.formats.update(part.get_dtype() for part in found)
        return bool(found)

    def quantize(self, weight: torch.Tensor, input_dim: int, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        """As `int8.quantize`."""
        wanted = scratch_for(weight)
        if self._scratch is None or self._scratch.numel() < wanted.numel():
            self._scratch = wanted
        quantize(weight, input_dim, out=out, scratch=self._scratch)
        self._rounded += weight.numel()
        advance(self._rounded, self._due, "bytes")

    def _new(self, *declared: torch.Tensor) -> Any:
        return tuple(torch.empty(part.shape, dtype=part.dtype, device=self.device) for part in declared)


class Round(ConversionOps):  # type: ignore[misc]
    """Run `operations` (maybe none), then store each result as its parameter was declared: int8 and scale, or cast."""

    def __init__(self, operations: list[ConversionOps], workspace: Workspace) -> None:
        self.operations = operations
        self.workspace = workspace
        self.dtype: torch.dtype | None = None
        """The loader's choice for a parameter that stays float, set before its tensor is read; None leaves it alone."""
        self.supports_many_to_many = any(operation.supports_many_to_many for operation in operations)

    def __deepcopy__(self, memo: dict[int, Any]) -> Round:
        """The loader copies a converter for every key of the checkpoint; what is in here never changes."""
        return Round(self.operations, self.workspace)

    @torch.no_grad()
    def convert(self, input_dict: Tensors, **kwargs: Any) -> Tensors:
        """{source pattern: tensors} to {full parameter name: tensor}, with `<name>_scale` beside each int8 one."""
        name, model = kwargs["full_layer_name"].replace("*.", "0."), kwargs["model"]
        self.workspace.used({})
        is_separable = all(_works_on_one_expert(operation) for operation in self.operations)
        if is_separable and len(kwargs["target_patterns"]) == 1 and _is_int8_stack(model, name):
            return self._round_experts(input_dict, name, model, kwargs)
        stored: Tensors = {}
        self.workspace.saw(input_dict)
        for full_name, value in _full_names(self._run(input_dict, kwargs), name):
            stored |= self._store(model, full_name, value)
        self.workspace.used(input_dict)
        return stored

    def _round_experts(self, input_dict: Tensors, name: str, model: nn.Module, kwargs: dict[str, Any]) -> Tensors:
        stored, scales = self.workspace.result(model, name)
        input_dim = _input_dim(model, name)
        outputs = -input_dim  # of [1, O, I], or of [1, I, O]
        for expert, (weight, scale) in enumerate(zip(stored.split(1), scales, strict=True)):
            parts = {pattern: _of_expert(tensors, expert, len(stored)) for pattern, tensors in input_dict.items()}
            if not all(parts.values()):
                return {}  # an expert is not in the checkpoint: the loader reports the stack as missing
            pieces = self._pieces(parts, outputs, kwargs)
            if not _fills(pieces, outputs, weight.shape):
                return {name: torch.cat(pieces, outputs)}  # the loader reports the mismatch by name
            sizes = [piece.shape[outputs] for piece in pieces]
            is_packed = self.workspace.saw(parts)
            for piece, rows, row_scale in zip(pieces, weight.split(sizes, outputs), scale.split(sizes), strict=True):
                self.workspace.quantize(piece[0], input_dim, (rows[0], row_scale))
                if is_packed:
                    self.workspace.requantised.zero_experts += not rows.any()
                if is_packed and expert == 0:
                    self.workspace.requantised.compare(piece[0], rows[0], row_scale, input_dim)
            self.workspace.used(parts)
        return {name: stored, f"{name}_scale": scales}

    def _pieces(self, parts: Tensors, outputs: int, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """One expert in pieces [1, ., .] along its outputs; merging and joining them first would only copy them."""
        tensors = self._placed(parts)
        for operation in self.operations:
            if isinstance(operation, MergeModulelist):
                tensors = {pattern: [part[None] for part in parts] for pattern, parts in tensors.items()}
            elif isinstance(operation, Concatenate) and operation.dim == outputs:
                joined = [tensors[pattern] for pattern in kwargs["source_patterns"] if pattern in tensors]
                tensors = {"": [piece for part in joined for piece in _listed(part)]}
            else:
                tensors = operation.convert(tensors, **kwargs)
        [pieces] = tensors.values()
        return _listed(pieces)

    def _run(self, tensors: Tensors, kwargs: dict[str, Any]) -> Tensors:
        tensors = self._placed(tensors)
        for operation in self.operations:
            tensors = operation.convert(tensors, **kwargs)
        return tensors

    def _placed(self, tensors: Tensors) -> Tensors:
        device = self.workspace.device
        return {
            pattern: [part.read(device) if isinstance(part, Unread) else part.to(device) for part in parts]
            for pattern, parts in tensors.items()
        }

    def _store(self, model: PreTrainedModel, name: str, value: torch.Tensor) -> Tensors:
        module_name, _, leaf = name.rpartition(".")
        module, declared = model.get_submodule(module_name), model.get_parameter_or_buffer(name)
        if declared.shape != value.shape:
            return {name: value}
        if is_int8(module, leaf):
            stored, scale = self.workspace.result(model, name)
            self.workspace.quantize(value, _input_dim(model, name), (stored, scale))
            return {name: stored, f"{name}_scale": scale}
        if type(module).__name__ == "Linear8bitLt" and leaf == "weight":
            return dict(Bnb8bitQuantize(None).convert({name: value}, model=model))
        return {name: value if self.dtype is None else value.to(self.dtype)}


def is_int8(module: nn.Module, name: str) -> bool:
    """Whether a module's parameter `name` is stored in our format: int8, with its scales beside it."""
    parameter = getattr(module, name, None)
    return parameter is not None and parameter.dtype == torch.int8 and hasattr(module, f"{name}_scale")


def _works_on_one_expert(operation: ConversionOps) -> bool:
    """Whether an operation gives the same result for a stack of one expert as for that expert in the whole stack."""
    merges = isinstance(operation, MergeModulelist) and operation.dim == 0
    joins = isinstance(operation, Concatenate) and operation.dim != 0
    return merges or joins


def _listed(part: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return part if isinstance(part, list) else [part]


def _fills(pieces: list[torch.Tensor], dim: int, shape: torch.Size) -> bool:
    """Whether pieces joined along `dim` have this shape."""
    across = {(*piece.shape[:dim], *piece.shape[dim + 1 :]) for piece in pieces}
    return across == {(*shape[:dim], *shape[dim + 1 :])} and sum(piece.shape[dim] for piece in pieces) == shape[dim]


def _of_expert(tensors: list[torch.Tensor], expert: int, num_experts: int) -> list[torch.Tensor]:
    """One expert's part of what the checkpoint has: a list with a tensor for each, or one stacked tensor."""
    if len(tensors) == num_experts and tensors[0].dim() < 3:
        return [tensors[expert]]
    if len(tensors) == 1 and tensors[0].dim() > 2:
        return [tensors[0][expert : expert + 1]]
    return []


def _is_int8_stack(model: nn.Module, name: str) -> bool:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    return is_experts(module) and is_int8(module, leaf)


def _input_dim(model: nn.Module, name: str) -> int:
    module = model.get_submodule(name.rpartition(".")[0])
    return -2 if is_experts(module) and module.is_transposed else -1


def _full_names(result: Tensors, first: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Full parameter names of a chain's results, which are keyed by target patterns; as `WeightConverter.convert`."""
    pattern = next((key for key in result if key in first), first)
    prefix, _, suffix = first.partition(pattern)
    for key, value in result.items():
        yield f"{prefix}{key}{suffix}", value[0] if isinstance(value, list) else value
