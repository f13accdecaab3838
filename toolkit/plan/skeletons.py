"""A model on the meta device for a plan, and what is read off it; the half of planning that needs torch."""

from __future__ import annotations

from contextlib import suppress

from transformers import AutoConfig, PreTrainedModel

from toolkit.architecture import describe, on_meta, shared_length
from toolkit.checkpoint.config import skeleton
from toolkit.errors import ModelError
from toolkit.mtp.cost import config_number, experts_per_token, head_parameters
from toolkit.ops.sink_attention import attend_with_sinks
from toolkit.plan.shapes import Shapes, is_published, published_config

__all__ = ["shape_of", "shapes_of"]

_NUMBERS = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "head_dim")


def shape_of(name: str, revision: str = "main", attn_implementation: str = "auto") -> PreTrainedModel:
    """The model on the meta device, from its config or a published one.

    Raises:
        ModelError: as `toolkit.checkpoint.config.skeleton`.
    """
    if not is_published(name, revision):
        model = skeleton(name, revision=revision)
    else:
        values = published_config(name)
        model = on_meta(AutoConfig.for_model(values.pop("model_type"), **values))
    if attn_implementation in ("eager", "sdpa"):
        model.set_attn_implementation(attn_implementation)
    elif attn_implementation == "auto":
        attend_with_sinks(model)
    return model


def shapes_of(model: PreTrainedModel) -> Shapes:
    """What a plan reads of a model.

    Raises:
        ModelError: it is no MoE, or a family that cannot work.
    """
    architecture, config = describe(model), model.config.get_text_config()
    found = {name: config_number(config, name) for name in (*_NUMBERS, "max_position_embeddings")}
    numbers = {name: value for name, value in found.items() if value is not None}
    numbers["experts_per_token"] = _chosen(model, architecture.layers[0].num_experts)
    numbers["shared_length"] = shared_length(model)
    with suppress(AttributeError, IndexError, NotImplementedError):  # a decoder that keeps its layers elsewhere
        numbers["head_parameters"] = head_parameters(model, config, 1)
    return Shapes(architecture, {name: tuple(p.shape) for name, p in model.named_parameters()}, numbers)


def _chosen(model: PreTrainedModel, experts: int) -> int:
    """Experts of a token."""
    chosen = experts_per_token(model.config.get_text_config(), experts)
    if not 1 <= chosen <= experts:
        raise ModelError(
            f"{type(model).__name__}: config.json sends each token to {chosen} of {experts} experts; fix it, or "
            "download the checkpoint again"
        )
    return chosen
