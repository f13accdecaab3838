"""One conversion operation that rounds weights expert by expert, as they come out of the checkpoint's files.

transformers would build a whole float stack first, and cast it to the compute dtype before that: several layers' worth
of memory. Here a family's own chain of operations (merge experts, concatenate gate and up) runs inside ours, on one
expert at a time, over tensors that are still pages of the mapped file, or packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist
from transformers.integrations.bitsandbytes import Bnb8bitQuantize

from toolkit.architecture import is_experts
from toolkit.checkpoint.weights import Unread
from toolkit.errors import ModelError, first_line, machine_failed
from toolkit.ops.four_bit import quantize_int4, quantize_mxfp4, turned
from toolkit.ops.int8 import quantize, scratch_for
from toolkit.quant.ahead import ReadAhead
from toolkit.quant.requantised import Requantised
from toolkit.quant.stored import BESIDE, float_shape, input_dim, is_stored, multiplied_out, names_of
from toolkit.steps import advance

__all__ = ["Round", "Workspace", "first_failure"]

Tensors = dict[str, Any]

_FAILURES: ContextVar[list[Exception] | None] = ContextVar("failures of roundings", default=None)


@contextmanager
def first_failure() -> Iterator[None]:
    """Raise what fails first in a rounding inside the block.

    transformers keeps such an error for a report, goes on with the next tensor, and ends with a line that names neither
    tensor nor cause. Memory that ran out would look like a damaged file.

    Raises:
        ValueError: the tensor and the cause. A ModelError, and what `machine_failed` says yes to, is raised as it is.
    """
    failures: list[Exception] = []
    token = _FAILURES.set(failures)
    try:
        yield
    except Exception:
        if not failures:
            raise
    finally:
        _FAILURES.reset(token)
    if failures:
        raise failures[0]


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
    keeps: bool = False
    """Whether stacks of four bits are taken as the files have them."""
    _results: dict[str, Tensors] = field(default_factory=dict)
    _scratch: torch.Tensor | None = None
    _expected: dict[int, list[Any]] = field(default_factory=dict)
    _ahead: ReadAhead | None = None
    _rounded: int = 0
    _due: int = 0

    def reserve(self, model: nn.Module) -> None:
        """Allocate every rounded parameter of a model on meta; nothing is touched yet."""
        for module_name, module in model.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                if is_stored(module, name):
                    self._results[f"{module_name}.{name}"] = self._new(module, module_name, name)
                    self._due += float_shape(module, name).numel()

    def has_reserved(self, name: str) -> bool:
        """Whether a parameter, rounded or beside such a one, is allocated and not filled yet."""
        return any(name.removesuffix(ending) in self._results for ending in BESIDE)

    def result(self, model: nn.Module, name: str) -> Tensors:
        """A stored parameter's tensors to fill, by full name."""
        module_name, _, leaf = name.rpartition(".")
        return self._results.pop(name, None) or self._new(model.get_submodule(module_name), module_name, leaf)

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

    def filled(self, count: int) -> None:
        """So many more values of results are there now."""
        self._rounded += count
        advance(self._rounded, self._due, "bytes")

    def saw(self, tensors: Tensors) -> bool:
        """Count what of this is packed; whether any is."""
        found = [part for parts in tensors.values() for part in parts if isinstance(part, Unread)]
        self.requantised.formats.update(part.get_dtype() for part in found)
        return bool(found)

    def round(self, weight: torch.Tensor, input_dim: int, out: Tensors, name: str, rows: slice = slice(None)) -> None:
        """A matrix [O, I], or [I, O], into these outputs of a stored one: `out` holds it and what is beside it."""
        stored, scale, step = (out.get(f"{name}{ending}") for ending in ("", "_scale", "_step"))
        assert stored is not None
        assert scale is not None
        if stored.dtype == torch.int8:
            self._round_int8(weight, input_dim, (stored[rows] if input_dim == -1 else stored[:, rows], scale[rows]))
        else:
            if step is None and scale.dtype != torch.uint8:
                raise ModelError(f"{name}: cannot be kept in four bits in this family; set quantization.experts=int8")
            matrix = weight.t() if input_dim == -2 else weight
            found = quantize_mxfp4(matrix) if step is None else quantize_int4(matrix)
            stored[:, rows], scale[..., rows] = found.packed, found.scale
            if step is not None and found.step is not None:
                step[:, rows] = found.step
        self.filled(weight.numel())

    def _round_int8(self, weight: torch.Tensor, input_dim: int, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        wanted = scratch_for(weight)
        if self._scratch is None or self._scratch.numel() < wanted.numel():
            self._scratch = wanted
        quantize(weight, input_dim, out=out, scratch=self._scratch)

    def _new(self, module: nn.Module, module_name: str, name: str) -> Tensors:
        parts = {each: getattr(module, each) for each in names_of(module, name)}
        return {
            f"{module_name}.{each}": torch.empty(part.shape, dtype=part.dtype, device=self.device)
            for each, part in parts.items()
        }


class Round(ConversionOps):  # type: ignore[misc]
    """Run `operations` (maybe none), then store each result as its parameter was declared: rounded, or cast."""

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
        """{source pattern: tensors} to {full parameter name: tensor}, with its scales beside each rounded one."""
        failures = _FAILURES.get()
        if failures:
            raise failures[0]  # nothing is loaded any more, so the rest is not read
        name = kwargs["full_layer_name"].replace("*.", "0.")
        try:
            return self._convert(input_dict, name, kwargs["model"], kwargs)
        except Exception as error:
            is_told = isinstance(error, ModelError) or machine_failed(error)
            told = error if is_told else ValueError(f"{name}: {first_line(error)}")
            if failures is not None:
                failures.append(told)
            raise told from error

    def _convert(self, input_dict: Tensors, name: str, model: nn.Module, kwargs: dict[str, Any]) -> Tensors:
        self.workspace.used({})
        is_separable = all(_works_on_one_expert(operation) for operation in self.operations)
        if is_separable and len(kwargs["target_patterns"]) == 1 and _is_stored_stack(model, name):
            return self._round_experts(input_dict, name, model, kwargs)
        stored: Tensors = {}
        self.workspace.saw(input_dict)
        for full_name, value in _full_names(self._run(input_dict, kwargs), name):
            stored |= self._store(model, full_name, value)
        self.workspace.used(input_dict)
        return stored

    def _round_experts(self, input_dict: Tensors, name: str, model: nn.Module, kwargs: dict[str, Any]) -> Tensors:
        result = self.workspace.result(model, name)
        module, _, leaf = name.rpartition(".")
        experts = model.get_submodule(module)
        shape, inputs = float_shape(experts, leaf), input_dim(experts)
        outputs = -inputs  # of [1, O, I], or of [1, I, O]
        keeps = self.workspace.keeps and result[name].dtype == torch.uint8
        for expert in range(shape[0]):
            parts = {pattern: _of_expert(tensors, expert, shape[0]) for pattern, tensors in input_dict.items()}
            if not all(parts.values()):
                return {}  # an expert is not in the checkpoint: the loader reports the stack as missing
            mine = {key: tensor[expert] for key, tensor in result.items()}
            if keeps:
                self._keep(parts, kwargs["source_patterns"], mine, name)
                self.workspace.used(parts)
                continue
            pieces = self._pieces(parts, outputs, kwargs)
            if not _fills(pieces, outputs, torch.Size((1, *shape[1:]))):
                return {name: torch.cat(pieces, outputs)}  # the loader reports the mismatch by name
            first = 0
            for piece in pieces:
                last = first + piece.shape[outputs]
                self.workspace.round(piece[0], inputs, mine, name, slice(first, last))
                first = last
            if self.workspace.saw(parts):
                self.workspace.requantised.zero_experts += all(_is_zero(piece) for piece in pieces)
                if expert == 0:
                    found = multiplied_out(mine, name, is_transposed=inputs == -2)
                    self.workspace.requantised.compare(torch.cat(pieces, outputs)[0], found, inputs)
            self.workspace.used(parts)
        return result

    def _keep(self, parts: Tensors, patterns: list[str], out: Tensors, name: str) -> None:
        """One expert's codes and scales as the files have them, its projections one after the other."""
        pieces = [part.codes(self.workspace.device) for pattern in patterns for part in parts.get(pattern, ())]
        codes, scales = (torch.cat([piece[side].flatten(0, -2) for piece in pieces]) for side in (0, 1))
        out[name].copy_(turned(codes))
        out[f"{name}_scale"].copy_(scales.t())
        self.workspace.filled(codes.numel())

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
        if is_stored(module, leaf):
            if float_shape(module, leaf) != value.shape:
                return {name: value}
            result = self.workspace.result(model, name)
            if value.dim() == 2:
                self.workspace.round(value, input_dim(module), result, name)
            for expert in range(len(value) if value.dim() == 3 else 0):
                mine = {key: tensor[expert] for key, tensor in result.items()}
                self.workspace.round(value[expert], input_dim(module), mine, name)
            return result
        if declared.shape != value.shape:
            return {name: value}
        if type(module).__name__ == "Linear8bitLt" and leaf == "weight":
            return dict(Bnb8bitQuantize(None).convert({name: value}, model=model))
        return {name: value if self.dtype is None else value.to(self.dtype)}


def _is_zero(piece: torch.Tensor) -> bool:
    """Whether nothing is in a piece [1, ., .]; its first row mostly tells."""
    return not bool(piece[:, :1].any()) and not bool(piece.any())


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


def _is_stored_stack(model: nn.Module, name: str) -> bool:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    return is_experts(module) and is_stored(module, leaf)


def _full_names(result: Tensors, first: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Full parameter names of a chain's results, which are keyed by target patterns; as `WeightConverter.convert`."""
    pattern = next((key for key in result if key in first), first)
    prefix, _, suffix = first.partition(pattern)
    for key, value in result.items():
        yield f"{prefix}{key}{suffix}", value[0] if isinstance(value, list) else value
