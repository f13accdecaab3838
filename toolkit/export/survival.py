"""How much of an adapter's effect is left in merged weights that were rounded again: measured on logits.

A quantised weight lies on a grid, and what an adapter adds is mostly smaller than half a step: rounded to the nearest
code it is gone, and the checkpoint is whole, loads, and answers as before. Comparing weights does not show it. Three
passes over a few hundred tokens do, each with one decoder layer in memory at a time.

The same logits give the loss of the next token: of the source, with the adapter, and of what was written.

    T tokens, V vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from toolkit.adapters.layouts import Factors
from toolkit.architecture import auto_class
from toolkit.errors import DataError
from toolkit.labels import IGNORED
from toolkit.quant.gptq.calibrate import make_batches
from toolkit.quant.gptq.observe import Batch
from toolkit.quant.source import SourceWeights
from toolkit.steps import advance, part

__all__ = ["LEAST_SHARE", "Losses", "Survival", "looked_at", "streamed_logits", "survival"]

LEAST_SHARE = 0.9
"""Of the adapter's change of the logits that has to be left."""
_MOST_TOKENS = 512
_ROWS = 64
_LAYER = re.compile(r".+\.\d+")


@dataclass(frozen=True)
class Losses:
    """The mean loss of `tokens` next tokens in nats: of the source, with the adapter in floats, and of the merge."""

    tokens: int
    base: float
    adapted: float
    merged: float

    def __str__(self) -> str:
        return (
            f"loss on {self.tokens} held-out tokens: {self.merged:.4f}, with the adapter in floats {self.adapted:.4f}, "
            f"of the base {self.base:.4f} (read back from the disk and multiplied out by onecard)"
        )


@dataclass(frozen=True)
class Survival:
    """What merged weights do to the logits z of `tokens` tokens: z0 of the source, z1 with the adapter, zm merged.

    `share` is ⟨zm − z0, z1 − z0⟩ / |z1 − z0|², 1 where the whole effect is left. `noise` is |zm − z1| / |z1 − z0|, 0
    where nothing else changed. `moved` is |z1 − z0| / |z0|. `losses` are of those tokens that answers were trained on,
    None where there are none.
    """

    tokens: int
    share: float
    noise: float
    moved: float
    losses: Losses | None = None

    def __str__(self) -> str:
        return (
            f"{self.share:.1%} of the adapter's change of the logits is left, with a difference of {self.noise:.1%} of "
            f"it beside ({self.tokens} tokens)"
        )


@part("measure")
@torch.no_grad()
def survival(
    source: Path,
    adapter: Sequence[Factors],
    texts: Sequence[Sequence[int]],
    merged: Callable[[Batch], Tensor],
    labels: Sequence[Sequence[int]] = (),
) -> Survival:
    """Compare merged weights with what they were made of.

    Args:
        source: the checkpoint that was merged into. texts: token ids, of which the first 512 are looked at.
        merged: gives the logits [T, V] of the merged checkpoint.
        labels: of each text, its ids where their loss counts and IGNORED elsewhere; all count where there are none.

    Raises:
        DataError: no text has two tokens.
    """
    batch, targets = looked_at(texts, labels)
    before, wanted = (streamed_logits(source, batch, update) for update in ((), adapter))
    return _compared(before, wanted, merged(batch), targets)


def looked_at(texts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] = ()) -> tuple[Batch, Tensor]:
    """The first 512 tokens of texts as one batch, and of each real token the next one's id [T], or IGNORED.

    Raises:
        DataError: no text has two tokens.
    """
    taken, room = list[tuple[Sequence[int], Sequence[int]]](), _MOST_TOKENS
    for text, counted in zip(texts, labels or texts, strict=True):
        if room > 1 and len(text) > 1:
            taken.append((text[:room], [*counted[1:room], IGNORED][: len(text[:room])]))
            room -= len(taken[-1][0])
    if not taken:
        raise DataError("no text of two tokens or more to compare logits on; give rows with --data FILE")
    taken.sort(key=lambda pair: len(pair[0]), reverse=True)  # as they lie in the batch
    batch = make_batches([text for text, _ in taken], torch.device("cpu"), most_tokens=1 << 40)[0]
    return batch, torch.tensor([target for _, counted in taken for target in counted])


def _compared(before: Tensor, wanted: Tensor, found: Tensor, targets: Tensor) -> Survival:
    """A few rows in fp64 at a time."""
    sums, losses = torch.zeros(4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for *rows, target in zip(*(each.split(_ROWS) for each in (before, wanted, found, targets)), strict=True):
        z0, z1, zm = (each.double() for each in rows)
        effect = z1 - z0
        terms = ((zm - z0) * effect, effect.square(), (zm - z1).square(), z0.square())
        sums += torch.stack([term.sum() for term in terms])
        losses += torch.stack([_summed_loss(logits, target) for logits in (z0, z1, zm)])
    along, effect, off, size = sums.tolist()
    effect = max(effect, 1e-300)
    counted = int((targets != IGNORED).sum())
    told = Losses(counted, *(losses / counted).tolist()) if counted else None
    return Survival(len(before), along / effect, (off / effect) ** 0.5, (effect / max(size, 1e-300)) ** 0.5, told)


def _summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def streamed_logits(source: Path, batch: Batch, adapter: Sequence[Factors] = ()) -> Tensor:
    """Logits [T, V] of a checkpoint in fp32 on the CPU, with an adapter added to its weights, for the real tokens.

    A decoder layer's weights are read when the model comes to it, and dropped when it is through.
    """
    weights = SourceWeights(str(source), model_of=_without_weights, also_ours=True)
    model = weights.model.eval()
    model.set_experts_implementation("eager")
    parts = list(weights.parts())
    layers = [name for name in parts if _LAYER.fullmatch(name)]
    with ExitStack() as stack:
        for name in parts:
            if name not in layers:
                stack.enter_context(_loaded(weights, name, adapter))
        model.tie_weights()
        for number, name in enumerate(layers, 1):
            loaded = partial(_loaded, weights, name, adapter)
            stack.enter_context(_when_called(model, name, loaded, (number, len(layers))))
        logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits
    return logits.flatten(0, 1)[batch.real].float()


def _without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """As `on_meta`, but for tables that are computed and not stored, such as rotary frequencies."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=False)
    return model


@contextmanager
def _loaded(weights: SourceWeights, name: str, adapter: Sequence[Factors]) -> Iterator[None]:
    """One part of the model with its weights in fp32, and what the adapter adds to them."""
    with weights.layer(name):
        weights.model.get_submodule(name).float()
        for factors in adapter:
            if factors.parameter.startswith(f"{name}."):
                factors.add_to(weights.model.get_parameter(factors.parameter))
        yield


@contextmanager
def _when_called(
    model: PreTrainedModel, name: str, loaded: Callable[[], AbstractContextManager[None]], told: tuple[int, int]
) -> Iterator[None]:
    """While a module runs, it is in its own context."""
    stack, module = ExitStack(), model.get_submodule(name)

    def enter(*_: Any) -> None:
        stack.enter_context(loaded())

    def leave(*_: Any) -> None:
        stack.close()
        advance(*told, "layers")

    handles = (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        stack.close()
