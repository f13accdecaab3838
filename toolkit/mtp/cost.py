"""What a multi-token-prediction head takes in training, from shapes alone; no library knows of one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from toolkit.recipe import Recipe

__all__ = [
    "HEAD_BYTES",
    "MOST_ANSWERS",
    "MOST_STATES",
    "config_number",
    "drafting_bytes",
    "experts_per_token",
    "head_bytes",
    "head_parameters",
    "head_step_bytes",
    "most_answers",
    "own_step_bytes",
]

_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
)
MOST_ANSWERS = 256
"""The model's own answers that a head learns from, where the recipe does not say how many."""
MOST_STATES = 1 << 28
"""Bytes of the model's hidden states that are kept of them from the writing on, in the computer's memory; beyond that
they are computed anew."""
HEAD_BYTES = 16
"""Of a parameter that trains in fp32: weight, gradient and AdamW's two moments."""

_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Bytes of logits in a chunk of the head's loss, as `toolkit.mtp.loss` cuts them."""
_CHUNKS = 6
"""Of that size at once: the head's logits and their logarithms, the model's, its shares, and two on the way."""
_SAVED = 1.25
"""Of a head's parameters over the hidden size, which is about the sum of its linears' outputs: numbers that a token
leaves for the backward pass. Measured, scripts/benchmarks/plan_memory.py."""
_CACHED = 4
"""Times the hidden size that a token keeps in a head's cache: key and value, twice while a pass makes them longer."""
_DRAWN = 4
"""Of a draft's vocabulary at once: the model's logits, what is left of them after `top_k` and the like, and two
distributions."""
_MASK = 22
"""Bytes for each pair of places where a layer is applied again: who sees whom, in several types. Measured likewise."""


def most_answers(recipe: Recipe) -> int:
    """The most prompts that the model answers for its head, 0 where there is none or it learns from the data alone."""
    wanted = recipe.mtp.own_answers
    return 0 if not recipe.mtp.enabled else MOST_ANSWERS if wanted is None else wanted


def head_parameters(model: nn.Module, config: Any, num_mtp_layers: int) -> int:
    """Parameters of a new head: projection, norms, a copy of the last block, and one dense SwiGLU for its experts.

    Args:
        model: on the meta device. config: the model's text config.
    """
    from toolkit.architecture import is_experts

    layer = model.get_decoder().layers[-1]  # type: ignore[operator]
    hidden = int(config.hidden_size)
    holding = {name.split(".")[0]: module for name, module in layer.named_modules() if is_experts(module)}
    kept = sum(math.prod(p.shape) for name, p in layer.named_parameters() if name.split(".")[0] not in holding)
    dense = sum(3 * hidden * _inner(experts) * experts_per_token(config) for experts in holding.values())
    total: int = num_mtp_layers * (2 * hidden * hidden + 3 * hidden + kept + dense)
    return total


def head_bytes(parameters: int) -> int:
    """Bytes of a new head of so many parameters, with its gradients and its optimizer."""
    return HEAD_BYTES * parameters


def head_step_bytes(
    parameters: int,
    hidden: int,
    vocab: int,
    *,
    batch: int,
    length: int,
    labelled: int,
    depth: int,
    layers: int,
    device: str,
) -> int:
    """Bytes that a head holds while it learns from one batch, before the model's own backward pass begins.

    On a CPU the logits of the labelled positions are among them: the model's loss keeps them for its backward pass, and
    the head learns from them.

    Args:
        parameters: of one layer. length: tokens of a sequence. labelled: positions in the batch. depth: tokens ahead.
        layers: of the head; beyond their number the last one is applied again. device: cpu or cuda.
    """
    logits = 4 * labelled * vocab
    own = int(4 * batch * length * depth * _SAVED * parameters / hidden)
    own += _MASK * batch * length**2 * sum(range(2, depth - layers + 2))
    return own + _CHUNKS * min(logits, _CHUNK[device]) + (2 * logits if device == "cpu" else 0)


def own_step_bytes(
    parameters: int,
    hidden: int,
    vocab: int,
    *,
    tokens: int,
    length: int,
    answer: int,
    depth: int,
    layers: int,
    device: str,
) -> int:
    """The same while it learns from the model's own answers: the model has no step then, and of a prompt a layer
    computes but the keys.

    Args:
        tokens: of a batch. length: of the longest prompt with its answer. answer: tokens of the longest answer.
    """
    rows = max(1, tokens // length)
    own = int(4 * rows * answer * depth * _SAVED * parameters / hidden)
    own += _MASK * rows * length * answer * sum(range(2, depth - layers + 2))
    return own + _CHUNKS * min(4 * rows * answer * vocab, _CHUNK[device])


def drafting_bytes(hidden: int, vocab: int, *, rows: int, length: int, count: int) -> int:
    """Bytes that drafts of many sequences at once add to writing: the head's keys and values, and logits with what is
    drawn from them, of every draft and of the token after them.

    Args:
        rows: sequences. length: of the longest. count: drafts a pass.
    """
    cache = _CACHED * 4 * rows * length * hidden
    return cache + _DRAWN * 4 * (count + 1) * rows * vocab


def _inner(experts: Any) -> int:
    shape = experts.down_proj.shape
    return int(shape[1] if experts.is_transposed else shape[2])


def experts_per_token(config: Any, otherwise: int = 1) -> int:
    """Experts that a token has, by the names that configs give their number; `otherwise` where they give none."""
    found = (config_number(config, name) for name in _PER_TOKEN)
    return next((number for number in found if number is not None), otherwise)


def config_number(config: Any, name: str) -> int | None:
    """A whole number of a config, None where it has none, or one for each layer, which transformers raises for."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:
        return None
    return value if isinstance(value, int) else None
