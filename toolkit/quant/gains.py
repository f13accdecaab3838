"""What each layer of a model in int4 would gain in int8: its loss on text, with that one layer in int8 and all others
as they are.

Only the model in int4 is in memory, and the int8 stacks of one layer, rounded from the checkpoint's own weights. Hidden
states up to a layer are those of the model in int4, so a measurement runs from that layer on. Libraries that mix widths
go by the error of weights, which says little of the loss.

    B sequences of T' tokens, H hidden; L layers
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.architecture import Architecture, ExpertLayer, describe
from toolkit.labels import IGNORED
from toolkit.ops.experts import SOURCE
from toolkit.ops.int8 import quantize
from toolkit.ops.label_logits import can_keep_logits, label_logits, summed_loss
from toolkit.quant.gptq.calibrate import make_batches
from toolkit.quant.gptq.observe import Batch, LayerCalls, decoder_layers
from toolkit.quant.source import SourceWeights
from toolkit.quant.stored import input_dim, names_of
from toolkit.recipe.sizes import BATCHES_PER_PASS, CALIBRATION_BATCH
from toolkit.steps import advance

__all__ = ["Gains", "measure_gains"]

_LOGITS = 1024
"""Positions whose logits exist at a time."""


@dataclass(frozen=True)
class Gains:
    """The mean loss of a token, in nats: with every layer in int4, with the chosen ones in int8, and what each layer
    alone takes off it. A layer that no token of text reaches gains nothing."""

    examples: int
    tokens: int
    loss: float
    mixed: float
    gains: Mapping[str, float]
    chosen: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@torch.no_grad()
def measure_gains(
    model: PreTrainedModel,
    name_or_path: str,
    examples: Sequence[Sequence[int]],
    layers: Collection[str],
    choose: Callable[[Mapping[str, float]], tuple[str, ...]],
    *,
    revision: str = "main",
) -> Gains:
    """Measure these MoE layers, let `choose` take some by what they gain, and measure the mixture.

    Args:
        model: in int4, resident or streamed, without an adapter; it is left as it was.
        name_or_path: the checkpoint it came from; its weights are read again, one decoder layer at a time.
        examples: token ids; the loss is that of every token but an example's first.

    Deterministic: the same text and weights give the same numbers.

    Raises:
        ModelError: the checkpoint holds no unrounded weights, or the model does something between its layers.
    """
    architecture, source = describe(model), SourceWeights(name_or_path, revision=revision)
    batches = make_batches(examples, model.device, most_tokens=CALIBRATION_BATCH)
    calls = LayerCalls(model, decoder_layers(architecture), batches)
    losses = _Losses(model, calls, batches)
    wanted = _by_decoder_layer(architecture, calls.names, layers)
    found = dict.fromkeys(layers, 0.0)
    sums: dict[str, float] = {}
    hidden = list(calls.hidden)
    for number, name in enumerate(calls.names):
        for layer in wanted.get(name, ()):
            if layer.name in sums:  # a layer that runs again
                continue
            with source.layer(name) as weights, in_int8(model, layer, weights):
                sums[layer.name] = losses.from_layer(number, hidden)
        hidden = [calls.run(number, batch, x) for batch, x in enumerate(hidden)]
        advance(number + 1, len(calls.names), "layers")
    plain = losses.of(hidden)
    tokens = max(1, sum(max(0, len(example) - 1) for example in examples))
    found |= {name: (plain - loss) / tokens for name, loss in sums.items()}
    chosen = choose(found)
    mixed = losses.of(_mixed_states(model, calls, source, wanted, chosen))
    return Gains(len(examples), tokens, plain / tokens, mixed / tokens, found, chosen)


def _mixed_states(
    model: PreTrainedModel,
    calls: LayerCalls,
    source: SourceWeights,
    wanted: Mapping[str, Sequence[ExpertLayer]],
    chosen: Collection[str],
) -> list[torch.Tensor]:
    """What the last layer gives with the chosen ones in int8, one at a time."""
    hidden = list(calls.hidden)
    for number, name in enumerate(calls.names):
        picked = [layer for layer in wanted.get(name, ()) if layer.name in chosen]
        with ExitStack() as held:
            weights = held.enter_context(source.layer(name)) if picked else {}
            for layer in picked:
                held.enter_context(in_int8(model, layer, weights))
            hidden = [calls.run(number, batch, x) for batch, x in enumerate(hidden)]
    return hidden


def _by_decoder_layer(
    architecture: Architecture, names: Sequence[str], layers: Collection[str]
) -> dict[str, list[ExpertLayer]]:
    """The MoE layers to measure, by the decoder layer that they are in."""
    return {
        name: [each for each in architecture.layers if each.name in layers and each.name.startswith(f"{name}.")]
        for name in names
    }


@contextmanager
def in_int8(model: nn.Module, layer: ExpertLayer, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """One layer's stacks in int8 for the block, rounded as they would be when loaded; the device holds them beside.

    Args:
        weights: of its decoder layer by full names, unrounded.
    """
    module = model.get_submodule(layer.name)
    device = next(iter(module.parameters())).device
    own, stream = dict(module.named_parameters(recurse=False)), module.__dict__.pop(SOURCE, None)
    try:
        for leaf, name in zip((layer.up, layer.down), layer.stacks, strict=True):
            for beside in names_of(module, leaf):
                delattr(module, beside)
            stack, scale = _rounded(weights[name], input_dim(module), device)
            module.register_parameter(leaf, nn.Parameter(stack, requires_grad=False))
            module.register_parameter(f"{leaf}_scale", nn.Parameter(scale, requires_grad=False))
        yield
    finally:
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            delattr(module, name)
        for name, parameter in own.items():
            module.register_parameter(name, parameter)
        if stream is not None:
            module.__dict__[SOURCE] = stream


def _rounded(stack: torch.Tensor, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 and scales of a float stack, one expert on the device after the other."""
    stored = torch.empty(stack.shape, dtype=torch.int8, device=device)
    scale = torch.empty((len(stack), stack.shape[-3 - dim]), dtype=torch.float32, device=device)
    for expert, matrix in enumerate(stack):
        quantize(matrix.to(device), dim, out=(stored[expert], scale[expert]))
    return stored, scale


class _Losses:
    """Losses from hidden states on, in nats, summed over all tokens of all batches."""

    def __init__(self, model: PreTrainedModel, calls: LayerCalls, batches: Sequence[Batch]) -> None:
        self._model, self._calls, self._batches = model, calls, batches

    def from_layer(self, number: int, hidden: Sequence[torch.Tensor]) -> float:
        """Of what a layer is given, by batch. Some batches go through each layer together, so that one that is streamed
        is brought in once for all of them."""
        total = 0.0
        for start in range(0, len(hidden), BATCHES_PER_PASS):
            places = range(start, min(start + BATCHES_PER_PASS, len(hidden)))
            states = [hidden[place] for place in places]
            for later in range(number, len(self._calls.names)):
                states = [self._calls.run(later, place, x) for place, x in zip(places, states, strict=True)]
            total += sum(self._loss(place, x) for place, x in zip(places, states, strict=True))
        return total

    def of(self, hidden: Sequence[torch.Tensor]) -> float:
        """Of what the last layer gives."""
        return sum(self._loss(place, x) for place, x in enumerate(hidden))

    def _loss(self, place: int, hidden: torch.Tensor) -> float:
        batch = self._batches[place]
        labels = batch.ids.masked_fill(~batch.real.view(batch.ids.shape), IGNORED)
        inputs = {"input_ids": batch.ids, "use_cache": False}
        if hasattr(self._model.config.get_text_config(), "output_router_logits"):
            inputs["output_router_logits"] = False
        total = 0.0
        with _known(self._model, self._calls, hidden):
            for window in _windows(labels, _LOGITS if can_keep_logits(self._model) else labels.numel()):
                logits, wanted, _ = label_logits(self._model, inputs, window)
                total += float(summed_loss(logits, wanted).double())
        return total


def _windows(labels: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """The labels [B, T'] in parts of about so many, each part's others left out; the first of a row is none."""
    width = max(1, most // len(labels))
    for start in range(1, labels.shape[1], width):
        part = torch.full_like(labels, IGNORED)
        part[:, start : start + width] = labels[:, start : start + width]
        yield part


class _Known(nn.Module):
    """In the place of a decoder layer: gives hidden states that are known already, whatever it is given."""

    def __init__(self, layer: nn.Module, given: Any) -> None:
        super().__init__()
        self.__dict__ |= {"layer": layer, "given": given}  # no module of this one's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same each time."""
        return self.given

    def __getattr__(self, name: str) -> Any:
        """What a model asks its layers, such as the kind of attention."""
        return getattr(self.__dict__["layer"], name)


@contextmanager
def _known(model: nn.Module, calls: LayerCalls, hidden: torch.Tensor) -> Iterator[None]:
    """Let the model do only what comes after its decoder layers, for the block."""
    layers = {name: model.get_submodule(name) for name in calls.names}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, _Known(layer, calls.as_given(name, hidden)))
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
