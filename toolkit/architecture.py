"""What an MoE model is made of: its expert stacks, routers and linears, found by enumeration.

No table of models. transformers marks every experts module (`use_experts_implementation`) and says which class gives
the router's logits (`_can_record_outputs`); everything else is read from shapes and positions. What cannot work is a
row of data at the end of this file, with its reason; what other programs call a family is in `toolkit.families`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import MtpLayer

from toolkit.errors import ModelError
from toolkit.families import SEE_EACH_OTHER_PACKED
from toolkit.parts import LINEAR_ROLES, Architecture, ExpertLayer, Linear

__all__ = [
    "CACHE_NAMES",
    "FEW_QUERIES",
    "LINEAR_ROLES",
    "Architecture",
    "ExpertLayer",
    "Linear",
    "auto_class",
    "balancing_loss",
    "bare_modules",
    "cache_name",
    "can_attend_with_sinks",
    "can_replace_sdpa",
    "describe",
    "expert_parameters",
    "is_experts",
    "is_of_adapter",
    "is_plain_linear",
    "keeps_running_state",
    "on_meta",
    "shared_length",
    "strip_index",
    "unwrapped",
]

_STATES = frozenset({"linear_attention", "mamba", "hybrid", "conv"})
"""Kinds of layers, by transformers' names, that keep a running state."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "index_topk")
"""How many tokens a layer may see at most: the last ones, those of a chunk, those that an indexer chooses."""


def is_experts(module: nn.Module) -> bool:
    """Whether transformers marked this module as an experts module."""
    return (
        hasattr(module, "_is_expert_parallel") and hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer that computes `x Wᵀ + b`: some families subclass `nn.Linear` to do otherwise."""
    cls = type(module)
    is_their_own = cls.__module__.startswith("transformers.models.") and cls.forward is not nn.Linear.forward
    return isinstance(module, nn.Linear) and not is_their_own


def expert_parameters(module: nn.Module) -> tuple[str, str]:
    """Names of the first and second projection's stacks of an experts module."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def describe(model: nn.Module) -> Architecture:
    """Enumerate the MoE layers and linears of `model` (on any device, meta included).

    An adapted model gives the same names as its bare base.

    Raises:
        ModelError: there is no MoE layer, a router cannot be told, or the family is one that cannot work.
    """
    _refuse(type(model))
    modules = bare_modules(model)
    recorded = _recorded_routers(modules)
    layers = tuple(_layer(modules, name, recorded) for name, module in modules.items() if is_experts(module))
    if not layers:
        if any(name.endswith(".experts") for name in modules):  # Llama 4 and LongCat Flash in transformers 5.23
            raise ModelError(
                f"{type(model).__name__}: its experts are not behind transformers' interface for experts, which this "
                "trains; give a checkpoint of another family"
            )
        raise ModelError(
            f"{type(model).__name__}: not a Mixture-of-Experts model (no experts module in it); "
            "give an MoE checkpoint, e.g. one named in recipes/"
        )
    return Architecture(layers, tuple(_linears(model, modules, layers)))


def auto_class(config: PretrainedConfig) -> Any:
    """The auto class that builds a text-generating model from this config.

    AutoModelForCausalLM wherever it can; some multimodal families have their language-model head only in the class of
    another mapping, and that one takes text alone as well.
    """
    classes = (AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForImageTextToText)
    return next((cls for cls in classes if type(config) in cls._model_mapping), AutoModelForCausalLM)


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: shapes and names, no weights."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=False)
    return model


@cache
def cache_name() -> str:
    """Which of `CACHE_NAMES` the installed transformers says, for code that hands a cache to a model."""
    return next(name for name in CACHE_NAMES if name in inspect.signature(MtpLayer.forward).parameters)


def can_replace_sdpa(model: PreTrainedModel) -> bool:
    """Whether attention that transformers' SDPA computes may be computed under another name than "sdpa".

    So it is in a model of one part, where no forward compares that name: sparse attention does, and leaves its own mask
    out under any other.
    """
    config = model.config
    return config._attn_implementation in ("sdpa", FEW_QUERIES) and not config.sub_configs and not _names(model, "sdpa")


def keeps_running_state(model: PreTrainedModel) -> bool:
    """Whether some layer's output depends on all tokens before by a state, not by attention to them."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return bool(getattr(model, "_is_stateful", False)) or not _STATES.isdisjoint(kinds)


def shared_length(model: PreTrainedModel) -> int:
    """Tokens of a prompt and an answer up to which several answers may stand behind one prompt; 0 where they never may.

    Each answer is then told to see the prompt and itself alone, which a window or a chunk counted along the row is not.
    """
    config = model.config.get_text_config()
    if keeps_running_state(model) or config.model_type in SEE_EACH_OTHER_PACKED:
        return 0
    sizes = [getattr(config, name, None) for name in ("max_position_embeddings", *_WINDOWS)]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=0)


def balancing_loss(model: PreTrainedModel) -> Callable[..., torch.Tensor] | None:
    """The family's own load-balancing loss of all layers' router logits, where it has one.

    It takes those [tokens, experts], how many experts there are, how many a token has, and a mask of tokens or None.
    """
    found: Callable[..., torch.Tensor] | None = getattr(
        import_module(type(model).__module__), "load_balancing_loss_func", None
    )
    return found


def can_attend_with_sinks(model: PreTrainedModel) -> bool:
    """Whether layers hand their sinks to an attention function, and compute them in plain operations without one.

    A model that takes none but its own function builds masks for that one: sparse attention does.
    """
    config, takes_others = model.config, model._supports_flash_attn
    return config._attn_implementation == "eager" and not config.sub_configs and takes_others and _names(model, "s_aux")


def _names(model: nn.Module, word: str) -> bool:
    """Whether a forward has this text, or an argument of this name."""
    forwards = (inspect.unwrap(kind.forward) for kind in {type(module) for module in model.modules()})
    constants = (constant for forward in forwards for constant in forward.__code__.co_consts)
    return any(constant == word or (isinstance(constant, tuple) and word in constant) for constant in constants)


def strip_index(name: str) -> str:
    """`model.layers.3.mlp.experts` to `mlp.experts`: what follows the last layer number."""
    return re.split(r"(?:^|\.)\d+\.", name)[-1]


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name as if nothing had been wrapped: PEFT keeps what it wraps in `base_layer`, its own in `lora_*`;
    what it wraps for the sake of tokens lies one deeper."""
    named = ((name.replace(".token_adapter.base_layer", ""), module) for name, module in model.named_modules())
    return {
        name.replace(".base_layer", ""): module
        for name, module in named
        if ".lora_" not in name and ".token_adapter" not in name
    }


def unwrapped(module: nn.Module) -> nn.Module:
    """An embedding or a head without what PEFT wraps around it for the sake of tokens."""
    original: nn.Module = getattr(module, "original_module", module)
    return original


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of a `PeftModel` is the adapter's own."""
    return "lora_" in name or "trainable_tokens_" in name


def _refuse(model_class: type[nn.Module]) -> None:
    for pattern, reason in _CANNOT_WORK.items():
        if re.search(pattern, model_class.__name__):
            raise ModelError(f"{model_class.__name__}: {reason}")
    if model_class.forward is nn.Module.forward:
        raise ModelError(
            f"{model_class.__name__}: transformers gives this model no forward pass, only its parts have one; save the "
            "part that writes text on its own and give that"
        )


def _layer(modules: Mapping[str, nn.Module], name: str, recorded: tuple[type, ...]) -> ExpertLayer:
    experts = modules[name]
    up, down = expert_parameters(experts)
    num_experts = int(getattr(experts, down).shape[0])
    router = _find_router(modules, name, num_experts, recorded)
    is_linear = is_plain_linear(modules[router])
    sees_text = not re.search(_OTHER_SENSES, name)
    return ExpertLayer(name, up, down, bool(experts.is_transposed), num_experts, router, is_linear, sees_text)


def _recorded_routers(modules: Mapping[str, nn.Module]) -> tuple[type, ...]:
    """The classes whose output transformers records as `router_logits`."""
    found: set[type] = set()
    for module in modules.values():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, (list, tuple)) else (recorders,):
            target = getattr(recorder, "target_class", recorder)
            found |= {target} if isinstance(target, type) else set()
    return tuple(found)


def _find_router(modules: Mapping[str, nn.Module], name: str, num_experts: int, recorded: tuple[type, ...]) -> str:
    """The module near the experts that scores them; the search widens from the experts' parent to the decoder layer."""
    parent, candidates = name, []
    while "." in parent:
        parent = parent.rpartition(".")[0]
        beside = [key for key in modules if key.startswith(f"{parent}.") and not f"{key}.".startswith(f"{name}.")]
        marked = tuple(f"{key}." for key in beside if isinstance(modules[key], recorded))
        inside = [key for key in beside if f"{key}.".startswith(marked)]
        candidates = _scorers(modules, inside, num_experts) or _scorers(modules, beside, num_experts, exact=True)
        if len(candidates) == 1:
            return candidates[0]
        if candidates or parent.rpartition(".")[2].isdigit():
            break
    raise ModelError(
        f"{name}: cannot tell its router: {len(candidates)} weights with a row for each of {num_experts} experts "
        f"beside it{' (' + ', '.join(candidates[:3]) + ')' if candidates else ''}; please report this model family"
    )


def _scorers(modules: Mapping[str, nn.Module], names: list[str], num_experts: int, exact: bool = False) -> list[str]:
    """Modules with a weight of one row per expert or, not `exact`, a few more: for shared or skipping experts."""
    rows = {name: shape[0] for name in names if len(shape := _weight_shape(modules[name])) == 2}
    found = [name for name, count in rows.items() if count == num_experts]
    if found or exact:
        return found
    return [name for name, count in rows.items() if num_experts < count < 2 * num_experts]


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(getattr(getattr(module, "weight", None), "shape", ()))


def _linears(model: nn.Module, modules: Mapping[str, nn.Module], layers: tuple[ExpertLayer, ...]) -> Iterator[Linear]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    head = None if head is None else unwrapped(head)
    routers = {layer.router for layer in layers}
    blocks = {layer.name.rpartition(".")[0] for layer in layers}
    experts = tuple(f"{layer.name}." for layer in layers)
    decoder = tuple({_decoder_of(layer.name) for layer in layers})
    for name, module in modules.items():
        is_left_out = isinstance(module, nn.Linear) and 0 in module.get_parameter("weight").shape
        if is_plain_linear(module) and not is_left_out and name not in routers and not name.startswith(experts):
            fused = name.rpartition(".")[2] in _FUSED and _is_state_space(modules.get(name.rpartition(".")[0]))
            yield Linear(
                name, "head" if module is head else "fused" if fused else _role(name, modules, blocks, decoder)
            )


def _is_state_space(module: nn.Module | None) -> bool:
    """Whether this is a Mamba mixer: only those have a skip `D` beside their decay `A_log`."""
    return hasattr(module, "A_log") and hasattr(module, "D")


def _decoder_of(name: str) -> str:
    """`model.language_model.layers.` of `model.language_model.layers.3.mlp.experts`."""
    return re.split(r"(?<=\.)\d+\.", name, maxsplit=1)[0]


def _role(name: str, modules: Mapping[str, nn.Module], blocks: set[str], decoder: tuple[str, ...]) -> str:
    is_other_sense = re.search(_OTHER_SENSES, name)
    if not name.startswith(decoder):
        return "tower" if is_other_sense or re.search(r"\.\d+\.", name) else "head"
    if is_other_sense:
        return "tower"
    if re.search(_SELECTOR, name):
        return "selector"
    if _weight_shape(modules[name])[0] < _GATE_OUTPUTS:
        return "gate"
    parent = name.rpartition(".")[0]
    if not re.search(_FEED_FORWARD, type(modules[parent]).__name__) and _is_attention(name):
        return "attention"
    return "shared" if "shared" in strip_index(name) or any(name.startswith(f"{b}.") for b in blocks) else "dense"


def _is_attention(name: str) -> bool:
    return any(re.search(_ATTENTION, part) for part in strip_index(name).split(".")[:-1])


_GATE_OUTPUTS = 16
"""A linear with fewer outputs than this steers others (a shared-expert gate) and is too small to be worth 8 bit."""

_FEED_FORWARD = r"(?i)mlp|feed_?forward"
"""Classes whose linears are no attention, whatever the block that holds them is called."""

_ATTENTION = r"attn|attention|mixer|mamba|ssm|linear_attn|conv|temporal"
"""Names of the token-mixing block of a decoder layer, in transformers' modeling files."""

_SELECTOR = r"\.indexer\."
"""The part of sparse attention that scores past tokens; a hard top-k stands between it and the loss."""

_FUSED = ("out_proj", "dt_proj")
"""Of a Mamba mixer: its kernels take these as tensors (`outproj_weight=self.out_proj.weight`), so an adapter would be
skipped and int8 values read as weights. PEFT refuses the first for the same reason."""

_OTHER_SENSES = r"vision|visual|image|video|audio|speech"
"""Words in the paths of parts that text tokens never reach."""

_CANNOT_WORK: Mapping[str, str] = {
    r"BlockDiffusion$": "it denoises blocks of text instead of predicting the next token, which this does not train",
}
"""Model classes, by pattern, that no rule can make work, and why."""

FEW_QUERIES = "onecard_few_queries"
"""The name in transformers' registry of SDPA with a faster way for a few queries (`toolkit.ops.few_queries`)."""

CACHE_NAMES = ("cache", "past_key_values")
"""The argument by which models take keys and values of earlier tokens: its name since transformers 5.24, and before.
Newer releases still take the older name from a caller, but hooks and parts of a model see the newer alone."""
