"""Whether TRL's fused head gives a family's own logits, asked before there are weights.

The trainer asks it of the model that it has (`AdapterSteps.check_fused_head`). Here the family's own forward and TRL's
are given the same hidden states by a stand-in for the layers below, and a head of a few words.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["gives_own_logits", "has_plain_head"]

_FACTORS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""What TRL's head looks for in a config, to do to logits as the family does."""

_WORDS, _TOKENS = 32, 6
_TOLERANCE = 1e-3
"""Of log-probabilities in fp32."""


class _Outputs(dict[str, Any]):
    """What the layers give: hidden states, and None for all else that a forward may ask for."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self["last_hidden_state"] if key == 0 else super().__getitem__(key)


class _Layers(nn.Module):
    """In the place of all layers."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        wave = torch.arange(_TOKENS * hidden, dtype=torch.float32).mul(0.7310585).sin()
        self.states = wave.view(1, _TOKENS, hidden)
        self.embed_tokens = nn.Embedding(1, 1)  # a model without one is taken to have no head

    def forward(self, *args: Any, **kwargs: Any) -> _Outputs:
        """Always the same."""
        return _Outputs(last_hidden_state=self.states)


def has_plain_head(config: PretrainedConfig) -> bool:
    """Whether TRL's logits are hidden states times the head's weights, and nothing else: its config names no factor."""
    text = config.get_text_config()
    return all(getattr(text, name, None) is None for name in _FACTORS)


@torch.no_grad()
def gives_own_logits(model: PreTrainedModel) -> bool:
    """Whether a skeleton's own forward, with logits that nothing but its head and config make, agrees with TRL's.

    So it is where the forward cannot be run on a stand-in: then the trainer finds out. `model` is not changed.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return True
    with torch.device("cpu"):
        return _agree(model, head)


def _agree(model: PreTrainedModel, head: nn.Linear) -> bool:
    small = nn.Linear(head.in_features, _WORDS, bias=head.bias is not None)
    wave = torch.arange(small.weight.numel(), dtype=torch.float32).mul(0.317).cos()
    small.weight.copy_(wave.view_as(small.weight))
    if small.bias is not None:
        small.bias.copy_(torch.arange(_WORDS).mul(0.1))
    asked = copy.copy(model)
    asked._modules = dict(model._modules)
    asked._modules[model.base_model_prefix] = _Layers(head.in_features)
    for name, module in model._modules.items():
        if module is head:
            asked._modules[name] = small
    ids = torch.arange(_TOKENS)[None]
    try:
        own = model.__class__.forward(asked, input_ids=ids).logits
        theirs = _of_trl(asked, small, ids)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return True
    wanted = _log_probs(own, ids)
    return bool(((wanted - theirs).abs() / wanted.abs().clamp(min=1)).max() <= _TOLERANCE)


def _of_trl(asked: PreTrainedModel, head: nn.Linear, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities by TRL's head; the module that has it takes seconds to import, and is rarely needed."""
    if has_plain_head(asked.config):
        return _log_probs(head(asked.base_model().last_hidden_state), ids)
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(asked)
    log_probs: torch.Tensor = asked(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    return log_probs


def _log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
