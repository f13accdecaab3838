"""A new head for a family without one: DeepSeek-V3's module around a copy of the model's last block.

transformers builds such modules for families whose checkpoints carry one and for no other. Attention and norms are
copied, since the head's work is nearly the last layer's; experts become one dense SwiGLU as wide as a token's experts
together, so that a draft touches no router. Source: "DeepSeek-V3 Technical Report", section 2.2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpLayer

from toolkit.architecture import bare_modules, is_experts
from toolkit.errors import ModelError
from toolkit.mtp.cost import experts_per_token
from toolkit.mtp.head import MtpHead, SwiGlu
from toolkit.ops.experts import expert_weights
from toolkit.ops.int8 import dequantize

__all__ = ["new_head"]

_OUTPUTS = {"o_proj", "out_proj", "dense", "wo"}
"""Names of the last projection of an attention block."""

_OUTPUT_SCALE = 0.1
"""Measured on the embedded model, KL after 80 steps: at full strength 1.7, at a tenth 1.08, random attention 1.10."""


def new_head(model: PreTrainedModel, *, num_mtp_layers: int = 1, copied: bool = True, seed: int = 0) -> MtpHead:
    """A head in fp32 for a bare loaded model, int8 or not; no global random number is drawn.

    Args:
        copied: start from the last layer's attention and norms; otherwise from random numbers, for comparison.

    Raises:
        ModelError: the last layer has no attention that a head could copy, or its block cannot be told apart.
    """
    config = copy.deepcopy(model.config.get_text_config())
    decoder = model.get_decoder()
    layer, final_norm = decoder.layers[-1], _final_norm(decoder)
    if not any(hasattr(module, "k_proj") or hasattr(module, "kv_b_proj") for module in bare_modules(layer).values()):
        raise ModelError(
            f"{type(model).__name__}: its last layer has no attention for a multi-token-prediction head to copy; "
            "set mtp.enabled=false"
        )
    random = torch.Generator().manual_seed(seed)
    layers = [_layer(config, layer, final_norm, copied, random) for _ in range(num_mtp_layers)]
    for index, made in enumerate(layers):
        _number(made, index)
    return MtpHead(layers, config).to(model.get_input_embeddings().weight.device)


def _layer(config: Any, layer: nn.Module, final_norm: nn.Module, copied: bool, random: torch.Generator) -> MtpLayer:
    config.rms_norm_eps = getattr(config, "rms_norm_eps", 1e-6)
    dense = _dense_in_place_of_experts(config, layer)
    with torch.device("meta"):
        made = MtpLayer(config, lambda *_: _block(config, layer, dense), _norm_class(final_norm), 0)
    made.to_empty(device="cpu").float()
    _fill(made, random, getattr(config, "initializer_range", 0.02) or 0.02)
    for norm in (made.enorm, made.hnorm, made.post_norm):
        _copy_tensors(norm, final_norm)
    if copied:
        _copy_tensors(made.mtp_block, layer)
        _scale_down_outputs(made.mtp_block)
    else:
        _copy_buffers(made.mtp_block, layer)
        for norm in (m for n, m in made.mtp_block.named_modules() if "norm" in n.rpartition(".")[2]):
            _reset(norm)
    return made.requires_grad_(True)


def _block(config: Any, layer: nn.Module, dense: Mapping[str, Callable[[], nn.Module]]) -> nn.Module:
    """An empty twin of a decoder layer, the children that hold its experts replaced."""
    block: nn.Module = type(layer)(config, config.num_hidden_layers - 1)
    for child, make in dense.items():
        block.set_submodule(child, make())
    return block


def _dense_in_place_of_experts(config: Any, layer: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    """What makes the dense SwiGLU that stands in for each child of a decoder layer that holds experts."""
    bare = bare_modules(layer)
    made: dict[str, Callable[[], nn.Module]] = {}
    for name in (name for name, module in bare.items() if is_experts(module)):
        stack = expert_weights(bare[name]).down
        child, width = name.split(".")[0], stack.inputs * experts_per_token(config)
        made[child] = partial(SwiGlu, config.hidden_size, width, gives_pair=_gives_pair(layer, child, config))
    return made


@torch.no_grad()
def _gives_pair(layer: nn.Module, child: str, config: Any) -> bool:
    """Whether the block of experts returns the router's scores as well, seen by running it on two tokens."""
    module = layer.get_submodule(child)
    norm = next(m for n, m in layer.named_modules() if "norm" in n and hasattr(m, "weight"))
    x = torch.ones((1, 2, config.hidden_size), dtype=norm.weight.dtype, device=norm.weight.device)
    with torch.random.fork_rng(devices=[]):
        was_training = module.training
        result = module.eval()(x)
        module.train(was_training)
    return isinstance(result, tuple)


@torch.no_grad()
def _fill(module: nn.Module, random: torch.Generator, std: float) -> None:
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=std, generator=random)
        else:
            parameter.zero_()
    for child in module.modules():
        if isinstance(child, SwiGlu):
            child.down_proj.weight.div_(math.sqrt(2))


@torch.no_grad()
def _copy_tensors(target: nn.Module, source: nn.Module) -> None:
    """Every parameter and buffer that both have by name and shape, int8 ones multiplied out."""
    bare = bare_modules(source)
    for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
        path, _, leaf = name.rpartition(".")
        module = bare.get(path)
        found = getattr(module, leaf, None)
        if not isinstance(found, torch.Tensor) or found.shape != tensor.shape:
            continue
        scale = getattr(module, f"{leaf}_scale", None)
        tensor.copy_(found if scale is None else dequantize(found, scale))


@torch.no_grad()
def _scale_down_outputs(block: nn.Module) -> None:
    """Attention that knows what to look for and says it softly: its input is far smaller than the last layer's was."""
    for name, module in block.named_modules():
        if name.rpartition(".")[2] in _OUTPUTS and isinstance(module, nn.Linear):
            module.weight.mul_(_OUTPUT_SCALE)


def _copy_buffers(target: nn.Module, source: nn.Module) -> None:
    bare = bare_modules(source)
    for name, buffer in target.named_buffers():
        path, _, leaf = name.rpartition(".")
        buffer.copy_(getattr(bare[path], leaf))


@torch.no_grad()
def _reset(norm: nn.Module) -> None:
    """As the family starts a norm: what gives a unit scale."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, torch.Tensor):
        start: Any = type(norm)(2)
        weight.fill_(float(start.weight.detach()[0]))  # zero-centred norms start at 0, others at 1


def _final_norm(decoder: nn.Module) -> nn.Module:
    found = [module for name, module in decoder.named_children() if "norm" in name]
    if len(found) != 1:
        raise ModelError(f"{type(decoder).__name__}: its final norm cannot be told; set mtp.enabled=false")
    return found[0]


def _norm_class(norm: nn.Module) -> Any:
    def make(size: int, eps: float) -> nn.Module:
        """Copied afterwards, so that whatever else the family's norm holds comes along."""
        return copy.deepcopy(norm).to("meta")

    return make


def _number(layer: nn.Module, index: int) -> None:
    """A head's layers have caches of their own, counted from 0."""
    for module in layer.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = index  # type: ignore[assignment]
