"""The multi-token-prediction head as a module: one or more decoder blocks that guess the tokens after the next.

transformers' `MtpLayer` is the block and its projection; `MtpModel` around it cannot be trained (its loss raises),
drafts each depth once and knows no packed documents. Here one layer may be applied again for further depths, and what
the head shares with its model (embedding, output head, rotary angles) stays the model's.

    B sequences, L tokens in each, H hidden, k the depth: row t holds the hidden state of token t and the embedding of
    token t + k, and guesses token t + k + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import MtpLayer

from toolkit.architecture import cache_name
from toolkit.errors import ModelError

__all__ = ["MtpHead", "SwiGlu", "Trunk", "capture_hidden", "causal_mask", "every_hidden"]

_PROBE = 4
"""Tokens that a model is run on to see how it makes logits of its output head."""


@dataclass(frozen=True)
class Trunk:
    """What a head shares with its model, none of it trained here.

    `scale` is what the family multiplies its output head's result with; `layer_type` picks the rotary angles where they
    differ by layer; `window` is how far back the block's attention sees, None for all the way; `words` are the tokens
    that `output` tells apart, in order, None for all.
    """

    embed: nn.Module
    output: nn.Module
    rotary: nn.Module | None
    scale: float
    layer_type: str | None
    window: int | None
    words: torch.Tensor | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, layer_type: str | None = None) -> Trunk:
        """Read off a bare model (an adapted one's `get_base_model()`).

        Raises:
            ModelError: the family makes its logits in a way that a head cannot follow.
        """
        config, output = model.config.get_text_config(), model.get_output_embeddings()
        rotary = getattr(model.get_decoder(), "rotary_emb", None)
        layer_types = getattr(config, "layer_types", None)
        kind = layer_type or (layer_types[-1] if layer_types else None)
        has_kinds = rotary is not None and bool(_kinds_of_rotary(config))
        slides = kind == "sliding_attention" or (kind is None and getattr(config, "use_sliding_window", True) is True)
        window = getattr(config, "sliding_window", None) if slides else None
        return cls(
            model.get_input_embeddings(),
            output,
            rotary,
            _logit_scale(model),
            kind if has_kinds else None,
            window or None,
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., H], after the final norm, to logits [..., V]."""
        scores: torch.Tensor = self.output(hidden.to(self.weight.dtype))
        return scores if self.scale == 1.0 else scores * self.scale

    @property
    def weight(self) -> torch.Tensor:
        """The output head's weight [V, H]."""
        weight: torch.Tensor = self.output.weight  # type: ignore[assignment]
        return weight

    def narrowed(self, words: torch.Tensor) -> Trunk:
        """The same with an output head of these tokens only, which must rise: logits [..., len(words)]."""
        bias = getattr(self.output, "bias", None)
        output = nn.Linear(self.weight.shape[1], len(words), bias=bias is not None, device="meta")
        kept = {"weight": self.weight[words], **({} if bias is None else {"bias": bias[words]})}
        output.load_state_dict(kept, assign=True)
        return replace(self, output=output.requires_grad_(False), words=words)

    def columns(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where in the logits these tokens stand; they must be among `words`."""
        return tokens if self.words is None else torch.searchsorted(self.words, tokens)

    def angles(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Rotary angles as the family's attention takes them; None for families without."""
        if self.rotary is None:
            return None
        kind = {} if self.layer_type is None else {"layer_type": self.layer_type}
        return self.rotary(x, position_ids=position_ids, **kind)


class SwiGlu(nn.Module):
    """`down(silu(gate x) * up x)`; gives a pair where the block that it stands in unpacks one.

    `wanted` [B, L] are the rows whose result anybody looks at; the others get zeros. None for all.
    """

    def __init__(self, hidden: int, width: int, *, gives_pair: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.gives_pair = gives_pair
        self.wanted: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        """x [..., H] to [..., H]."""
        few = self.wanted is not None and self.wanted.shape == x.shape[:-1]
        rows = x[self.wanted] if few else x
        y = self.down_proj(functional.silu(self.gate_proj(rows)) * self.up_proj(rows))
        if few:
            y = y.new_zeros(x.shape).index_put((self.wanted,), y)
        return (y, None) if self.gives_pair else y


class MtpHead(nn.Module):
    """`layers` in order of depth; the last one is applied again for depths beyond their number.

    Its `state_dict` holds the head's own parameters alone; nothing of the model is a submodule. `native` are
    the keys it was read from, None for a new head.
    """

    def __init__(
        self, layers: Sequence[MtpLayer], config: PretrainedConfig, shared_norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shared_norm = shared_norm
        self.config = config
        self.native: Any = None

    def follow_attention(self, implementation: str | None) -> str:
        """Compute attention as the model does, where a plain mask can tell that way what it needs; gives what it is."""
        can = implementation in {"eager", "sdpa"} or (implementation or "").startswith("onecard_")
        chosen = str(implementation) if can else "sdpa"
        if self.config._attn_implementation != chosen:
            self.config._attn_implementation = chosen
        return chosen

    def step(
        self,
        trunk: Trunk,
        depth: int,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None = None,
        wanted: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The head's own hidden states [B, L, H] at `depth`, counted from 1, after its final norm.

        Args:
            hidden: [B, L, H], of the model at depth 1, of the head at the depth before otherwise.
            tokens: [B, L], `depth` further on than the hidden states. position_ids: [B, L], of those tokens.
            mask: what `causal_mask` gives.
            cache: keys and values of earlier calls; layer i of the head is layer i of the cache.
            wanted: [B, L], the rows that will be looked at; a new head gives the others what is of no use.
        """
        for module in self.modules():
            if isinstance(module, SwiGlu):
                module.wanted = wanted
        index = min(depth, len(self.layers)) - 1
        embedded = trunk.embed(tokens).to(hidden.dtype)
        output: Any = self.layers[index](
            embedded,
            hidden,
            position_embeddings=trunk.angles(embedded, position_ids),
            attention_mask=mask,
            position_ids=position_ids,
            **{cache_name(): cache},
            **kwargs,
        )
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result if self.shared_norm is None else self.shared_norm(result)

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that train: all that are not stored in int8 or belong to such a weight."""
        yield from ((name, p) for name, p in self.named_parameters() if p.requires_grad)


def causal_mask(
    documents_BL: torch.Tensor, valid_BL: torch.Tensor | None, window: int | None, *, additive: torch.dtype | None
) -> torch.Tensor:
    """Who sees whom within a row of documents: [B, 1, L, L], true where seen, or 0 and the smallest number of a dtype.

    Args:
        documents_BL: a number for every document of a sequence. valid_BL: false for padding.
        window: how many tokens, itself included, each one sees.
    """
    length = documents_BL.shape[1]
    steps = torch.arange(length, device=documents_BL.device)
    seen = steps[:, None] >= steps[None, :]
    if window:
        seen = seen & (steps[:, None] - steps[None, :] < window)
    mask = (seen & (documents_BL[:, :, None] == documents_BL[:, None, :])).unsqueeze(1)
    if valid_BL is not None:
        # A padded query sees itself, since nothing at all would be NaN.
        mask = (mask & valid_BL[:, None, None, :].bool()) | torch.eye(length, dtype=torch.bool, device=mask.device)
    if additive is None:
        return mask
    return torch.zeros(mask.shape, dtype=additive, device=mask.device).masked_fill(~mask, torch.finfo(additive).min)


@contextmanager
def capture_hidden(model: PreTrainedModel) -> Iterator[Callable[[], torch.Tensor]]:
    """Within the block, the function it gives returns the last forward's hidden states [B, L, H], after the final norm.

    `output_hidden_states` would keep every layer's, and TRL's own loss leaves no way to ask for it.
    """
    kept: dict[str, torch.Tensor] = {}
    with every_hidden(model, lambda hidden: kept.update(hidden=hidden)):
        yield lambda: kept["hidden"]


@contextmanager
def every_hidden(model: PreTrainedModel, told: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Within the block, `told` is given each forward's hidden states [B, L, H], after the final norm."""

    def tell(_module: nn.Module, _args: Any, output: Any) -> None:
        told(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    hook = model.get_decoder().register_forward_hook(tell)
    try:
        yield
    finally:
        hook.remove()


def _kinds_of_rotary(config: PretrainedConfig) -> Any:
    parameters = getattr(config, "rope_parameters", None)
    return config.nested_rope_parameter_keys(parameters) if parameters else ()


@torch.no_grad()
def _logit_scale(model: PreTrainedModel) -> float:
    was_training = model.training
    model.eval()
    output = model.get_output_embeddings()
    ids = torch.arange(3, 3 + _PROBE, device=output.weight.device)[None] % output.weight.shape[0]
    try:
        with capture_hidden(model) as hidden:
            logits = model(input_ids=ids, use_cache=False).logits.double()
            raw = output(hidden()).double()
    finally:
        model.train(was_training)
    scale = float((raw * logits).sum() / (raw * raw).sum()) if raw.shape == logits.shape else 0.0
    eps = torch.finfo(output.weight.dtype).eps
    if not torch.allclose(raw * scale, logits, rtol=8 * eps, atol=8 * eps * float(raw.abs().max())):
        raise ModelError(
            f"{type(model).__name__}: its logits are not a multiple of its output head's result, which no "
            "multi-token-prediction head here can follow; set mtp.enabled=false"
        )
    return 1.0 if abs(scale - 1.0) < 8 * eps else scale
