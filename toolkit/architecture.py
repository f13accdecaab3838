"""What an MoE model is made of: its expert stacks, routers and linears, found by enumeration.

No table of models. transformers marks every experts module (`use_experts_implementation`) and says which class gives
the router's logits (`_can_record_outputs`); everything else is read from shapes and positions. What cannot work is a
row of data at the end of this file, with its reason.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
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
from toolkit.parts import LINEAR_ROLES, Architecture, ExpertLayer, Linear

__all__ = [
    "CACHE_NAMES",
    "DRAFT_CARRIER",
    "GGUF_NAMES",
    "GGUF_NEEDS_CONFIG",
    "GGUF_NORMALISED",
    "GGUF_NORMS_FROM_ONE",
    "GGUF_READ",
    "GGUF_ROTATED_IN_PAIRS",
    "GGUF_SIGMOID",
    "GGUF_SPLITS",
    "GGUF_TAKES_FOR_GRANTED",
    "GGUF_TILED_VALUE_HEADS",
    "GGUF_WITH_EXPERTS",
    "GGUF_WRITTEN",
    "LINEAR_ROLES",
    "MLX_EXPERTS",
    "MLX_TAKES_FOR_GRANTED",
    "MTP_LAYOUTS",
    "MTP_WITHOUT_END_NORM",
    "Architecture",
    "ExpertLayer",
    "Linear",
    "auto_class",
    "bare_modules",
    "cache_name",
    "can_attend_per_document",
    "can_attend_with_sinks",
    "describe",
    "expert_parameters",
    "is_experts",
    "is_plain_linear",
    "on_meta",
    "strip_index",
]


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


def can_attend_per_document(model: PreTrainedModel) -> bool:
    """Whether packed documents may be attended to one by one, under another attention's name than "sdpa".

    So it is where transformers' SDPA computes, in a model of one part, and no forward compares that name: sparse
    attention does, and leaves its own mask out under any other.
    """
    config = model.config
    return config._attn_implementation == "sdpa" and not config.sub_configs and not _names(model, "sdpa")


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
    """Modules by name as if nothing had been wrapped: PEFT keeps what it wraps in `base_layer`, its own in `lora_*`."""
    return {name.replace(".base_layer", ""): module for name, module in model.named_modules() if ".lora_" not in name}


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
    routers = {layer.router for layer in layers}
    blocks = {layer.name.rpartition(".")[0] for layer in layers}
    experts = tuple(f"{layer.name}." for layer in layers)
    decoder = tuple({_decoder_of(layer.name) for layer in layers})
    for name, module in modules.items():
        if is_plain_linear(module) and name not in routers and not name.startswith(experts):
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

CACHE_NAMES = ("cache", "past_key_values")
"""The argument by which models take keys and values of earlier tokens: its name since transformers 5.24, and before.
Newer releases still take the older name from a caller, but hooks and parts of a model see the newer alone."""

MTP_LAYOUTS: tuple[tuple[str, str], ...] = (
    (r"^model\.mtp_block\.(\d+)\.", r"layers.\1.mtp_block."),
    (r"^model\.mtp_emb_norm\.(\d+)\.", r"layers.\1.enorm."),
    (r"^model\.mtp_hidden_norm\.(\d+)\.", r"layers.\1.hnorm."),
    (r"^model\.mtp_linear_proj\.(\d+)\.", r"layers.\1.eh_proj."),
    (r"^model\.mtp\.layers\.(\d+)\.final_layernorm\.", r"layers.\1.post_norm."),
    (r"^model\.mtp\.layers\.(\d+)\.pre_mlp_layernorm\.", r"layers.\1.mtp_block.post_attention_layernorm."),
)
"""Key names of multi-token-prediction heads that transformers' own mapping lacks: patterns and what they become in its
`MtpModel`. Sources: the weight maps of ERNIE-4.5-21B-A3B-PT (rows 1 to 4) and MiMo-V2-Flash (5 and 6)."""

DRAFT_CARRIER = "glm4_moe"
"""The family in whose clothes servers can take a head of ours for a model of another: DeepSeek-V3's module around a
block of grouped-query attention (biases, and norms of queries and keys, optional) and experts, some always at work.
Source: vLLM's glm4_moe_mtp.py, which `--speculative-config` gets at with a draft folder of its own."""

MTP_WITHOUT_END_NORM = re.compile(r"^model\.mtp_linear_proj\.")
"""Key names of heads that go from their block straight to the output head. Source: the same weight map of ERNIE-4.5."""

GGUF_NAMES: Mapping[str, str] = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "deepseek_v32": "deepseek32",
    "deepseek_v4": "deepseek4",
    "glm4_moe_lite": "deepseek2",
    "glm4v_moe": "glm4moe",
    "glm_moe_dsa": "glm-dsa",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "mimo_v2_flash": "mimo2",
    "mixtral": "llama",
    "solar_open": "glm4moe",
}
"""llama.cpp's name of an architecture, by model type, where more than hyphens differ from transformers'. Source: the
classes that its `conversion` package registers (llama.cpp of llama-cpp-python 0.3.36)."""

GGUF_ROTATED_IN_PAIRS = frozenset({"granitemoe", "granitemoehybrid", "granitemoeshared", "mixtral", "nemotron_h"})
"""Model types whose rows of query and key llama.cpp's converter reorders from halves to pairs (`LlamaModel.permute`,
for classes with `undo_permute`), since its rotary embedding of these architectures turns neighbours."""

GGUF_READ = frozenset(
    {
        *("afmoe", "gemma4", "kimi-linear", "mimo2", "mistral4"),
        *("deepseek2", "dots1", "ernie4_5-moe", "exaone-moe", "glm-dsa", "glm4moe", "gpt-oss"),
        *("granitehybrid", "granitemoe", "hunyuan-moe", "jamba", "lfm2moe", "llama", "minimax-m2"),
        *("nemotron_h_moe", "olmoe", "phimoe", "qwen2moe", "qwen35moe", "qwen3moe", "qwen3next"),
    }
)
"""llama.cpp's architectures of which a tiny model, written by its converter, came back here as it was, config and every
parameter. `scripts/parity/gguf_source.py` shows it."""

GGUF_NEEDS_CONFIG = frozenset({"gemma4", "kimi-linear", "mimo2", "mistral4"})
"""Those of `GGUF_READ` whose metadata does not say enough for a config, such as how each kind of layer rotates."""

GGUF_WITH_EXPERTS: Mapping[str, str] = {"nemotron_h_moe": "nemotron_h"}
"""Model type of an architecture that has a name of its own over there where it has experts."""

GGUF_TAKES_FOR_GRANTED: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {"mup_enabled": True},
    "deepseek_v2": {"norm_topk_prob": False},
    "deepseek_v3": {"norm_topk_prob": False},
    "qwen3_moe": {"norm_topk_prob": True},
}
"""By model type: fields of which a GGUF file says nothing, because llama.cpp computes so whatever the file says
(`src/models/`), or because the converter writes no other value than the other one."""

GGUF_NORMS_FROM_ONE = frozenset({"qwen3next", "qwen35moe"})
"""llama.cpp's architectures whose norms are stored as one more than the weight. Source: `data_torch + 1` in its
`conversion/qwen.py`."""

GGUF_TILED_VALUE_HEADS = frozenset({"qwen35moe"})
"""Those whose value heads of linear attention are stored tiled. Source: `_LinearAttentionVReorderBase` there."""

_GGUF_GROUPS = (
    "leading_dense_block_count expert_feed_forward_length expert_shared_count expert_weights_scale expert_weights_norm "
    "expert_group_count expert_group_used_count expert_gating_func"
)
GGUF_WRITTEN: Mapping[str, str] = {
    "deepseek2": f"{_GGUF_GROUPS} attention.kv_lora_rank attention.q_lora_rank",
    "dots1": _GGUF_GROUPS,
    "ernie4_5-moe": (
        "leading_dense_block_count expert_feed_forward_length expert_shared_count expert_shared_feed_forward_length "
        "interleave_moe_layer_step"
    ),
    "glm4moe": _GGUF_GROUPS,
    "gpt-oss": "expert_feed_forward_length attention.sliding_window",
    "granitemoe": "attention.scale embedding_scale residual_scale logit_scale expert_shared_feed_forward_length",
    "llama": "",
    "minimax-m2": "expert_feed_forward_length expert_gating_func",
    "olmoe": "",
    "qwen2moe": "expert_feed_forward_length expert_shared_feed_forward_length",
    "qwen3moe": "expert_feed_forward_length",
}
"""llama.cpp's architectures whose files are written here without one to start from, and the keys that its converter
writes for them beside those that all have. `scripts/parity/merged_gguf.py` shows that its own library computes the
same of them."""

GGUF_SIGMOID = frozenset({"deepseek_v3", "dots1", "glm4_moe", "glm4_moe_lite", "minimax_m2", "solar_open"})
"""Model types whose experts are chosen by sigmoids, which a file says (`expert_gating_func`)."""

MLX_EXPERTS: Mapping[str, str] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe", "granitemoe", "mixtral", "olmoe"), "switch_mlp"),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), "switch_mlp"),
    **dict.fromkeys(("dots1", "gpt_oss"), "experts"),
}
"""Model types that mlx-lm computes alike (`scripts/parity/merged_checkpoints.py`), and its name of their experts."""
MLX_TAKES_FOR_GRANTED: Mapping[str, Mapping[str, Any]] = {
    **{name: {"norm_topk_prob": False} for name in ("deepseek_v2", "qwen2_moe")},
    "mixtral": {"sliding_window": None},
}

GGUF_SPLITS: Mapping[str, bool] = {
    "gpt-2": False,
    "qwen2": False,
    "qwen35": False,
    "gpt-4o": False,
    "llama-bpe": True,
    "tekken": True,
}
"""Ways to split text that have a name in GGUF files, one of each that transformers tells apart, and whether llama.cpp
takes a word that the vocabulary has without merging it together (`ignore_merges` in its `llama-vocab.cpp`)."""

GGUF_NORMALISED = frozenset({"deepseek-r1-qwen", "qwen2", "qwen35"})
"""llama.cpp's names of ways to split text whose tokenizers normalise it to NFC. Source: `tokenizer.json` of Qwen2.5."""
