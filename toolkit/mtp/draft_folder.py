"""A new head as a draft folder that servers load beside a model whose own family they know no head for.

Their code for heads is written family by family; none takes our module for any model. But one family's head is the same
mathematics with other names: its always-active shared expert holds our dense SwiGLU, and routed experts of zeros add
nothing. Whether a base's attention fits is not looked up but tried: both blocks run on the same numbers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import MtpLayer

from toolkit.architecture import auto_class, bare_modules, cache_name, is_experts
from toolkit.errors import ModelError, first_line
from toolkit.families import DRAFT_CARRIER
from toolkit.mtp.head import SwiGlu, causal_mask

__all__ = ["draft_config", "draft_tensors"]

_ROUTED = 2
"""Experts of zeros: routers by groups take the two best of a group."""

_OFF = 1e-4
"""Of the largest output; both blocks are the same sums in fp32."""


def draft_config(config: PretrainedConfig, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The config.json of a head's draft folder.

    Args:
        config: the base's. state: the head's tensors by the names of its file.
    """
    text = config.get_text_config()
    names = {name.split(".", 3)[3] for name in state}
    width, hidden = next(t.shape for n, t in state.items() if n.endswith(".gate_proj.weight"))
    head_dim = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    rope = dict(getattr(text, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0})
    shared = _shares(width)
    layers = len({name.split(".")[2] for name in state})
    return {
        "architectures": [_carrier_class().__name__],
        "model_type": DRAFT_CARRIER,
        "attention_bias": "self_attn.q_proj.bias" in names,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        "first_k_dense_replace": 0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": width,
        "max_position_embeddings": text.max_position_embeddings,
        "moe_intermediate_size": width // shared,
        "n_group": 1,
        "n_routed_experts": _ROUTED,
        "n_shared_experts": shared,
        "norm_topk_prob": True,
        "num_attention_heads": text.num_attention_heads,
        "num_experts_per_tok": 1,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "num_nextn_predict_layers": layers,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": {**rope, "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0)},
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_qk_norm": "self_attn.q_norm.weight" in names,
        "vocab_size": text.vocab_size,
    }


def draft_tensors(
    skeleton: PreTrainedModel, state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], float]:
    """The head under the carrier's names, and how far its output is from ours, over the largest.

    Args:
        skeleton: the base on meta.

    Raises:
        ModelError: the base's attention is not what the carrier has.
    """
    config, told = skeleton.config.get_text_config(), draft_config(skeleton.config, state)
    child = _dense_child(skeleton)
    named = {name: tensor for key, tensor in state.items() for name in [_renamed(key, child)]}
    for layer in sorted({name.split(".")[2] for name in state}, key=int):
        named |= _zero_experts(f"model.layers.{layer}.mlp", told, next(iter(state.values())).dtype)
    try:
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            raise ValueError("its attention sees a window, the carrier's everything")
        off = max(_difference(skeleton, told, child, state, named, int(layer)) for layer in _layers(state))
    except RuntimeError:  # of loading one block's tensors into the other
        raise ModelError(_refusal(skeleton, "its attention has other parts than theirs")) from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(_refusal(skeleton, first_line(error))) from None
    if not off <= _OFF:
        raise ModelError(_refusal(skeleton, f"its attention computes something else (off by {off:.1e})"))
    return named, off


def _refusal(skeleton: PreTrainedModel, why: str) -> str:
    return f"{type(skeleton).__name__}: no server takes a new head for this family: {why}"


def _layers(state: Mapping[str, torch.Tensor]) -> list[str]:
    return sorted({name.split(".")[2] for name in state}, key=int)


def _carrier_class() -> type[PreTrainedModel]:
    config = CONFIG_MAPPING[DRAFT_CARRIER]()
    made: type[PreTrainedModel] = auto_class(config)._model_mapping[type(config)]
    return made


def _dense_child(skeleton: PreTrainedModel) -> str:
    """The child of a decoder layer that holds its experts, and in a head the dense SwiGLU."""
    layer = skeleton.get_decoder().layers[-1]
    return next(name.split(".")[0] for name, module in bare_modules(layer).items() if is_experts(module))


def _shares(width: int) -> int:
    """In how many shared experts a width is cut, so that the experts of zeros are small."""
    return next((n for n in (8, 4, 2) if width % n == 0 and width // n >= 16), 1)


def _renamed(name: str, child: str) -> str:
    return re.sub(rf"^(model\.layers\.\d+\.){re.escape(child)}\.", r"\1mlp.shared_experts.", name)


def _zero_experts(block: str, told: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Routed experts that add nothing, and a router that does not care."""
    hidden, inner = told["hidden_size"], told["moe_intermediate_size"]
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    found = {
        f"{block}.experts.{expert}.{leaf}.weight": torch.zeros(shape, dtype=dtype)
        for expert in range(_ROUTED)
        for leaf, shape in shapes.items()
    }
    found[f"{block}.gate.weight"] = torch.zeros((_ROUTED, hidden), dtype=dtype)
    found[f"{block}.gate.e_score_correction_bias"] = torch.zeros(_ROUTED)
    return found


@torch.no_grad()
def _difference(
    skeleton: PreTrainedModel,
    told: Mapping[str, Any],
    child: str,
    state: Mapping[str, torch.Tensor],
    named: Mapping[str, torch.Tensor],
    layer: int,
) -> float:
    """Largest difference of the two heads' outputs on the same random numbers, near and far from the beginning."""
    random = torch.Generator().manual_seed(layer)
    embedded, hidden = torch.randn((2, 1, 7, told["hidden_size"]), generator=random)
    positions = torch.tensor([[1, 2, 3, 4, 5, 6, 7]]) + told["max_position_embeddings"] // 3
    ours = _run(_our_layer(skeleton, child, state, layer), skeleton, embedded, hidden, positions)
    carrier = CONFIG_MAPPING[DRAFT_CARRIER](**{**told, "num_hidden_layers": 1, "vocab_size": 8})
    carrier._attn_implementation = "eager"
    with torch.device("meta"):
        whole = _carrier_class()(carrier)
    theirs = _run(_carrier_layer(whole, carrier, named, layer), whole, embedded, hidden, positions)
    return float((ours - theirs).abs().max() / ours.abs().max())


def _run(
    layer: MtpLayer, model: PreTrainedModel, embedded: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    rotary = type(model.get_decoder().rotary_emb)(layer.config)
    documents = torch.zeros(positions.shape, dtype=torch.long)
    output = layer(
        embedded,
        hidden,
        position_embeddings=rotary(embedded, position_ids=positions),
        attention_mask=causal_mask(documents, None, None, additive=torch.float32),
        position_ids=positions,
        **{cache_name(): None},
    )
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _our_layer(skeleton: PreTrainedModel, child: str, state: Mapping[str, torch.Tensor], layer: int) -> MtpLayer:
    """Our module around the base's own block, filled from the head's file."""
    config = copy.deepcopy(skeleton.config.get_text_config())
    config._attn_implementation = "eager"
    decoder = skeleton.get_decoder()
    prefix = f"model.layers.{layer}."
    width, hidden = state[f"{prefix}{child}.gate_proj.weight"].shape

    def block(*_: Any) -> nn.Module:
        made: nn.Module = type(decoder.layers[-1])(config, config.num_hidden_layers - 1)
        made.set_submodule(child, SwiGlu(hidden, width))
        return made

    norm = partial(_norm, next(m for n, m in decoder.named_children() if "norm" in n))
    with torch.device("meta"):
        made = MtpLayer(config, block, norm, 0)
    made.load_state_dict(_of_layer(state, prefix), assign=True)
    return made.eval()


def _carrier_layer(
    whole: PreTrainedModel, config: PretrainedConfig, named: Mapping[str, torch.Tensor], layer: int
) -> MtpLayer:
    """The carrier's module, filled from what the draft folder will hold."""
    decoder = whole.get_decoder()
    norm = partial(_norm, next(m for n, m in decoder.named_children() if "norm" in n))
    with torch.device("meta"):
        made = MtpLayer(config, type(decoder.layers[-1]), norm, 0)
    experts = {name: torch.zeros(p.shape) for name, p in made.named_parameters() if ".experts." in name}
    own = {n: t for n, t in _of_layer(named, f"model.layers.{layer}.").items() if ".experts." not in n}
    made.load_state_dict({**own, **experts}, assign=True)
    return made.eval()


def _of_layer(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of one layer of a head, in fp32, by the names of `MtpLayer`."""
    found = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix).replace("shared_head.norm.", "post_norm.")
            is_outside = rest.split(".")[0] in {"enorm", "hnorm", "eh_proj", "post_norm"}
            found[rest if is_outside else f"mtp_block.{rest}"] = tensor.float()
    return found


def _norm(like: nn.Module, size: int, eps: float) -> nn.Module:
    return copy.deepcopy(like)
