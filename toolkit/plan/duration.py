"""The time an optimizer step cannot beat on a card, and an honest guess of what it takes.

Three limits, each from counted work and the card's published rates: products on the tensor cores, weights through the
memory, streamed stacks through the bus. Perfect overlap leaves the slowest of them; nothing can be faster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from toolkit.mtp.cost import HEAD_BYTES, most_answers
from toolkit.offload.place import streamed
from toolkit.parts import LINEAR_ROLES
from toolkit.plan.cards import Card
from toolkit.plan.memory import Bytes
from toolkit.plan.shapes import Shapes
from toolkit.plan.steps import StepShape, trained_rows
from toolkit.recipe import Recipe, rollout_options
from toolkit.recipe.sizes import BATCHES_PER_PASS, CALIBRATION_BATCH, MOST_CALIBRATION_TOKENS

__all__ = ["Duration", "measured_passes", "step_duration"]

_REACHED = {"arithmetic": 0.2, "memory": 0.8, "bus": 0.8}
"""Shares of the published rates. The first is what the fastest published run of such a job reached, all its overheads
included (docs/planning.md); long reads and pinned copies are assumed. Nothing of ours has run on a card."""
_FAST = 0.45
"""Share of the arithmetic's rate that large products alone reach: even such a computation must hide the copies."""

_PASSES_OF_ALL = 4
"""With every layer in int4 to record their calls, and for their inputs; with the mixture, likewise."""
_WELL_HIDDEN = 0.5
"""Share of the computation's time that copies beside it may take before the plan trades them for memory."""


@dataclass(frozen=True)
class Duration:
    """Seconds of an optimizer step: each limit alone, and the estimate."""

    arithmetic: float
    memory: float
    bus: float
    estimate: float
    afterwards: float = 0.0
    """Once, when all steps are over: a head's own answers at their longest."""
    beforehand: float = 0.0
    """Once, before the first: measuring which layers of a budget are int8, on as many calibration tokens as may be."""

    @property
    def limit(self) -> float:
        """What it cannot beat."""
        return max(self.arithmetic, self.memory, self.bus)

    @property
    def hides_copies(self) -> bool:
        """Whether copies need so little of the time of everything else that they disappear in it, even unevenly."""
        likely = _at_reach(asdict(self))
        return likely["bus"] <= _WELL_HIDDEN * (self.arithmetic / _FAST + likely["memory"])

    def to_dict(self) -> dict[str, float]:
        """JSON-able."""
        return {**asdict(self), "limit": self.limit}


def step_duration(
    shapes: Shapes,
    recipe: Recipe,
    card: Card,
    sizes: Bytes,
    stacks: Mapping[str, int],
    placement: Mapping[str, str],
    adapter: int,
    shape: StepShape,
    micro_batches_per_pass: int = 1,
) -> Duration:
    """Of all micro-batches of one optimizer step.

    Args:
        stacks: MoE layer to bytes. adapter: trained parameters. shape: of the longest sequence.
        micro_batches_per_pass: micro-batches that share a streamed layer.
    """
    training = recipe.training
    passes = 4 if training.gradient_checkpointing else 3  # forward, again, input gradients; factors' in 3 all the same
    mismatched = int(training.method == "kto" and recipe.kto.loss_type == "kto")  # forward alone
    passes += mismatched
    micro, batch, length = training.gradient_accumulation_steps, training.per_device_train_batch_size, shape.length
    rows, width, targets, _ = trained_rows(recipe, shape, shapes.numbers.get("shared_length", 0))
    tokens = micro * rows * width
    frozen = _active(shapes) * tokens * 2 * (passes - 1)
    attention = _attention(shapes, length) * tokens * (passes - 0.5)
    low_rank = adapter * _share(shapes) * tokens * 2 * passes
    head = _head(shapes, recipe, sizes, tokens, micro * rows * targets)
    arithmetic = (frozen + attention + low_rank + head) / (card.bf16_tflops * 1e12)
    weights = sizes.linears + sizes.other + sum(stacks.values())
    moved = micro * (passes - 1) * weights + 2 * (sizes.adapter + sizes.gradients + sizes.optimizer)
    away = sum(stacks[name] for name in streamed(placement))
    limits = {
        "arithmetic": arithmetic,
        "memory": moved / (card.memory_rate * 1e9),
        "bus": (2 + mismatched) * math.ceil(micro / micro_batches_per_pass) * away / (card.pcie_rate * 1e9),
    }
    if options := rollout_options(recipe):
        often = micro * batch / options.at_once(training) / options.num_iterations
        written = often * options.at_once(training) * length, often * options.max_completion_length
        more = _writing(shapes, card, weights, away, *written)
        limits = {name: limit + more[name] for name, limit in limits.items()}
    afterwards = _own_answers(shapes, recipe, card, weights, away, length)
    beforehand = _measuring(shapes, recipe, card, weights, away, length) if shapes.budget is not None else 0.0
    return Duration(**limits, estimate=_likely(limits), afterwards=afterwards, beforehand=beforehand)


def _likely(limits: Mapping[str, float]) -> float:
    likely = _at_reach(limits)
    return max(likely["arithmetic"] + likely["memory"], likely["bus"])


def _at_reach(limits: Mapping[str, float]) -> dict[str, float]:
    return {name: limits[name] / share for name, share in _REACHED.items()}


def _own_answers(shapes: Shapes, recipe: Recipe, card: Card, weights: int, away: int, length: int) -> float:
    """Seconds that the model takes to answer as many prompts as it may, each prompt a whole sequence."""
    answers = most_answers(recipe)
    tokens = answers * (length + recipe.eval.max_new_tokens)
    passes = math.ceil(answers / recipe.eval.batch_size) * recipe.eval.max_new_tokens
    return _likely(_writing(shapes, card, weights, away, tokens, passes))


def _writing(shapes: Shapes, card: Card, weights: int, away: int, tokens: float, passes: float) -> dict[str, float]:
    """Limits of reading and writing so many tokens, in so many passes of one token for each answer."""
    return {
        "arithmetic": 2 * _active(shapes) * tokens / (card.bf16_tflops * 1e12),
        "memory": passes * weights / (card.memory_rate * 1e9),
        "bus": passes * away / (card.pcie_rate * 1e9),
    }


def measured_passes(layers: int) -> float:
    """Passes through all layers that measuring them one by one takes: each from itself on, and a few with all."""
    return layers / 2 + _PASSES_OF_ALL


def _measuring(shapes: Shapes, recipe: Recipe, card: Card, weights: int, away: int, length: int) -> float:
    """Seconds that the loss with each layer in int8 takes, reading their weights apart."""
    tokens = min(MOST_CALIBRATION_TOKENS, recipe.quantization.calibration_samples * length)
    passes = measured_passes(len(shapes.architecture.layers))
    limits = {
        "arithmetic": 2 * _active(shapes) * tokens * passes / (card.bf16_tflops * 1e12),
        "memory": math.ceil(tokens / CALIBRATION_BATCH) * passes * weights / (card.memory_rate * 1e9),
        "bus": math.ceil(tokens / (CALIBRATION_BATCH * BATCHES_PER_PASS)) * passes * away / (card.pcie_rate * 1e9),
    }
    return _likely(limits)


def _head(shapes: Shapes, recipe: Recipe, sizes: Bytes, tokens: int, labelled: int) -> float:
    """Operations of a multi-token-prediction head: its linears over all tokens, and where there is a target its logits,
    their gradient and, for KL, the model's logits."""
    if not recipe.mtp.reads_data:
        return 0.0
    linears = 6 * sizes.mtp / HEAD_BYTES * tokens / recipe.mtp.num_mtp_layers
    vocabulary = shapes.numbers["vocab_size"] * shapes.numbers["hidden_size"]
    return recipe.mtp.depth * (linears + 2 * vocabulary * labelled * (3 if recipe.mtp.loss == "kl" else 2))


def _active(shapes: Shapes) -> float:
    """Frozen parameters that a token is multiplied with."""
    names = shapes.architecture.linear_names(*LINEAR_ROLES, "head")
    linears = sum(math.prod(shapes.parameters.get(f"{name}.weight", (0,))) for name in names)
    stacks = sum(math.prod(shapes.parameters[name]) for layer in shapes.architecture.layers for name in layer.stacks)
    return linears + stacks * _share(shapes)


def _share(shapes: Shapes) -> float:
    """Experts per token over experts."""
    experts = shapes.architecture.layers[0].num_experts
    return min(1.0, shapes.numbers["experts_per_token"] / experts)


def _attention(shapes: Shapes, length: int) -> float:
    """Operations a token of scores and their sums, causal: half of 2·2·L for each head's width in each layer."""
    numbers = shapes.numbers
    heads = numbers.get("num_attention_heads", 0)
    width = numbers.get("head_dim") or (numbers["hidden_size"] // heads if heads else 0)
    return float(2 * length * heads * width * numbers["num_hidden_layers"])
