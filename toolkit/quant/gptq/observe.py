"""Drive batches through a model's decoder layers one layer at a time, and see what each part of a layer is given.

The layers are called exactly as the model called them (masks, position embeddings and all, recorded once), so this
holds for every family. transformers' output recorders give hidden states, but only of whole forward passes.

    T rows (tokens of a batch), N rows of one expert, E experts, K experts a token, H hidden, I inputs of a part
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.architecture import Architecture
from toolkit.errors import ModelError

__all__ = [
    "Batch",
    "ExpertInputs",
    "LayerCalls",
    "LayerVisit",
    "LinearInputs",
    "Observed",
    "decoder_layers",
    "observe",
    "walk",
]


@dataclass(frozen=True)
class Batch:
    """Token ids [B, T'], padded on the right, and which of the B·T' rows are real, [T]."""

    ids: torch.Tensor
    real: torch.Tensor


@dataclass
class LinearInputs:
    """A linear's inputs in sum: x xᵀ over all rows [I, I] in fp32, and how many they were."""

    moment: torch.Tensor
    rows: int = 0

    @classmethod
    def of(cls, linear: nn.Linear) -> LinearInputs:
        """Nothing seen yet."""
        return cls(torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device))

    def add(self, real: torch.Tensor, input: torch.Tensor) -> None:
        """Count one call's real rows of `input` [..., I]."""
        x_TI = input.reshape(-1, input.shape[-1])
        x_TI = (x_TI[real] if x_TI.shape[0] == real.shape[0] else x_TI).float()
        self.moment.addmm_(x_TI.t(), x_TI)
        self.rows += x_TI.shape[0]


@dataclass
class ExpertInputs:
    """All that one experts module is given: rows [T, H], chosen experts [T, K] and routing weights [T, K], by batch."""

    hidden: list[torch.Tensor] = field(default_factory=list)
    index: list[torch.Tensor] = field(default_factory=list)
    weight: list[torch.Tensor] = field(default_factory=list)

    def add(
        self, real: torch.Tensor, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> None:
        """Keep one call's real rows; the arguments are named as transformers names them."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        keep = real if x_TH.shape[0] == real.shape[0] else torch.ones_like(x_TH[:, 0], dtype=torch.bool)
        self.hidden.append(x_TH[keep])
        self.index.append(top_k_index.reshape(x_TH.shape[0], -1)[keep])
        self.weight.append(top_k_weights.reshape(x_TH.shape[0], -1)[keep])

    def by_expert(self, num_experts: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each expert its rows' positions and routing weights, both [N]."""
        if not self.index:
            return [(torch.empty(0, dtype=torch.long), torch.empty(0))] * num_experts
        index_TK, weight_TK = torch.cat(self.index), torch.cat(self.weight)
        found = [torch.where(index_TK == expert) for expert in range(num_experts)]
        return [(token, weight_TK[token, slot].float()) for token, slot in found]


@dataclass(frozen=True)
class Observed:
    """What the parts of one decoder layer were given, by the parts' full names."""

    linears: dict[str, LinearInputs]
    experts: dict[str, ExpertInputs]


@dataclass(frozen=True)
class LayerVisit:
    """One decoder layer, and a pass through it for every batch: which rows are real, and the call to make."""

    name: str
    passes: Sequence[tuple[torch.Tensor, Callable[[], Any]]]


def decoder_layers(architecture: Architecture) -> re.Pattern[str]:
    """Matches the names of the decoder layers: the numbered siblings of those that hold experts."""
    stems = sorted({re.split(r"\.\d+\.", layer.name)[0] for layer in architecture.layers})
    return re.compile(rf"(?:{'|'.join(map(re.escape, stems))})\.\d+")


@torch.no_grad()
def observe(model: nn.Module, visit: LayerVisit, linears: Sequence[str], experts: Sequence[str]) -> Observed:
    """Make a visit, and sum up what these linears and experts modules inside its layer are given."""
    modules = {name: model.get_submodule(name) for name in (*linears, *experts)}
    seen_linears = {name: LinearInputs.of(cast(nn.Linear, modules[name])) for name in linears}
    seen_experts = {name: ExpertInputs() for name in experts}
    for real, call in visit.passes:
        with ExitStack() as hooks:
            for name in linears:
                hooks.enter_context(_before(modules[name], _feed(seen_linears[name], real)))
            for name in experts:
                hooks.enter_context(_before(modules[name], _feed(seen_experts[name], real)))
            call()
    return Observed(seen_linears, seen_experts)


@torch.no_grad()
def walk(model: PreTrainedModel, layers: re.Pattern[str], batches: Sequence[Batch]) -> Iterator[LayerVisit]:
    """Yield the decoder layers in the order in which the model runs them.

    A layer may be changed while it is held: the next one's inputs are computed when it is asked for, with the layers as
    they are then. Without gradients; memory is one hidden state [B, T', H] a batch and what the model itself hands its
    layers.

    Raises:
        ModelError: the model does something to hidden states between its layers.
    """
    calls = LayerCalls(model, layers, batches)
    hidden = calls.hidden
    for number, name in enumerate(calls.names):
        bound = [calls.bound(number, place, x) for place, x in enumerate(hidden)]
        yield LayerVisit(name, [(batch.real, run) for batch, run in zip(batches, bound, strict=True)])
        hidden = [_hidden(run()) for run in bound]


@dataclass(frozen=True)
class _Call:
    """One call of a decoder layer: the hidden states of the first, of later ones all but those."""

    name: str
    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayerCalls:
    """Every call that a model makes of its decoder layers, batch by batch, to be made again with other hidden states.

    `names` are the layers in the order in which they run, `hidden` what the first is given [B, T', H], by batch.

    Raises:
        ModelError: the model does something to hidden states between its layers.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, layers: re.Pattern[str], batches: Sequence[Batch]) -> None:
        self._modules = {name: module for name, module in model.named_modules() if layers.fullmatch(name)}
        self._traces = [_trace(model, self._modules, batch.ids) for batch in batches]
        self.names = tuple(call.name for call in self._traces[0]) if batches else ()
        self.hidden = [trace[0].hidden for trace in self._traces]
        self._widths: dict[str, int] = {}

    def bound(self, number: int, batch: int, hidden: torch.Tensor) -> Callable[[], Any]:
        """The call of a layer, by its place in `names`, for these hidden states of a batch."""
        call = self._traces[batch][number]
        return partial(self._modules[call.name], hidden, *call.args, **call.kwargs)

    def run(self, number: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that it gives back."""
        output = self.bound(number, batch, hidden)()
        self._widths[self.names[number]] = len(output) if isinstance(output, tuple) else 0
        return _hidden(output)

    def as_given(self, name: str, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which a layer that has run gives them: alone, or first of several."""
        width = self._widths[name]
        return (hidden, *[None] * (width - 1)) if width else hidden


def _trace(model: PreTrainedModel, modules: dict[str, nn.Module], ids: torch.Tensor) -> list[_Call]:
    """Every call of the decoder layers in one forward pass."""
    calls: list[_Call] = []
    outputs: list[torch.Tensor] = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            if outputs and x is not outputs[-1] and not torch.equal(x, outputs[-1]):
                raise ModelError(
                    f"{name}: this model changes hidden states between decoder layers, so its layers cannot be "
                    "calibrated one by one; set quantization.error_compensation=none, remove quantization.budget, and "
                    "report this model family"
                )
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            calls.append(_Call(name, x.new_empty(0) if calls else x, args[1:], rest))

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        outputs[:] = [_hidden(output)]

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(_before(module, before(name)))
            hooks.callback(module.register_forward_hook(after).remove)
        model.base_model(input_ids=ids, use_cache=False)
    return calls


def _hidden(output: Any) -> torch.Tensor:
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


@contextmanager
def _before(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _feed(inputs: LinearInputs | ExpertInputs, real: torch.Tensor) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.add(real, *args, **kwargs)

    return hook
