"""Every MoE family of the installed transformers, found by enumeration, and a tiny random checkpoint of each.

No list of names: a family is a model type that an auto class of text generation maps to a file with marked experts. Its
config class's own defaults are shrunk by field-name patterns; what patterns cannot know is a row of `SPECIAL`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from toolkit.architecture import auto_class

__all__ = ["STOCK_LOSES_KEYS", "Family", "build", "families", "marked_folders", "tiny_config"]

_MARK = "@use_experts_implementation"
_MODELS = Path(transformers.__file__).parent / "models"
_CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_MULTIMODAL = {
    **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


@dataclass(frozen=True)
class Family:
    """A model type with marked experts: the folder it lives in, and the class the auto mapping gives."""

    model_type: str
    folder: str
    model_class: str


@cache
def families() -> tuple[Family, ...]:
    """Every model type that AutoModelForCausalLM maps, and for folders it leaves out their multimodal type."""
    causal = _marked(_CAUSAL)
    known = {family.folder for family in causal}
    return (*causal, *(family for family in _marked(_MULTIMODAL) if family.folder not in known))


@cache
def marked_folders() -> frozenset[str]:
    """Folders of transformers' models whose experts are marked."""
    sources = _MODELS.glob("*/modeling_*.py")
    return frozenset(path.parent.name for path in sources if _MARK in path.read_text(encoding="utf-8"))


def _marked(mapping: Mapping[str, Any]) -> tuple[Family, ...]:
    found = []
    for model_type, classes in mapping.items():
        folder = model_type_to_module_name(model_type)
        model_class = classes if isinstance(classes, str) else classes[0]
        source = _MODELS / folder / f"modeling_{folder}.py"
        if folder in marked_folders() and f"class {model_class}(" in source.read_text(encoding="utf-8"):
            found.append(Family(model_type, folder, model_class))
    return tuple(sorted(found, key=lambda family: family.model_type))


def tiny_config(model_type: str) -> PretrainedConfig:
    """The family's default config, shrunk: one layer of every kind, eight experts, sizes of a few dozen."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**_shrunk(cls()))


def build(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, each tensor large enough that its part shows in the logits."""
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        _fill(name, parameter)
    return model.eval()


@torch.no_grad()
def _fill(name: str, parameter: torch.Tensor) -> None:
    if parameter.dim() >= 2:
        parameter.normal_(std=0.2)
    else:
        parameter.add_(torch.randn_like(parameter) * 0.1)


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    fields = {key: value for key, value in config.to_dict().items() if key not in _NOT_FIELDS}
    layers = _layers_of_every_kind(fields)
    count = fields.get("num_hidden_layers")
    result: dict[str, Any] = {}
    for key, value in fields.items():
        if key in config.sub_configs and value is not None:
            result[key] = {**_shrunk(getattr(config, key)), "model_type": value["model_type"]}
        elif key == "num_hidden_layers":
            result[key] = len(layers)
        elif isinstance(value, list) and len(value) == count:
            result[key] = (
                [_small(key, value[index]) for index in layers] if _tells_kinds(value) else [*range(len(layers))]
            )
        elif isinstance(value, dict) and _is_by_layer(value):
            kept = {layers.index(int(index)): entry for index, entry in value.items() if int(index) in layers}
            result[key] = {str(index): _small_layer(fields, entry, result) for index, entry in kept.items()}
        else:
            result[key] = _small(key, value)
    return {**result, **_related(fields, result), **SPECIAL.get(config.model_type, {})}


def _related(fields: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Heads that were equal in number stay so; head sizes that are sums of a rotated and a plain part stay sums."""
    related = {}
    if fields.get("num_key_value_heads") == fields.get("num_attention_heads") is not None:
        related["num_key_value_heads"] = small["num_attention_heads"]
    if {"qk_rope_head_dim", "qk_nope_head_dim"} <= fields.keys():
        full, total = (d["qk_rope_head_dim"] + d["qk_nope_head_dim"] for d in (fields, small))
        related |= {key: total for key in ("qk_head_dim", "head_dim") if fields.get(key) == full}
    return related


def _layers_of_every_kind(fields: Mapping[str, Any]) -> list[int]:
    """Layer numbers that hold each value of each per-layer field once, and at least three where there are as many."""
    count = fields.get("num_hidden_layers") or 0
    lists = [value for value in fields.values() if isinstance(value, list) and len(value) == count]
    kinds = [values for values in lists if _tells_kinds(values)]
    tables = [value for value in fields.values() if isinstance(value, dict) and _is_by_layer(value)]
    kinds += [[{int(key): entry for key, entry in table.items()}.get(i) for i in range(count)] for table in tables]
    chosen: list[int] = []
    seen: set[tuple[int, str]] = set()
    for index in range(count):
        new = {(number, str(values[index])) for number, values in enumerate(kinds)} - seen
        if new:
            chosen.append(index)
            seen |= new
    spare = [index for index in range(count) if index not in chosen]
    return sorted(chosen + spare[: max(0, 3 - len(chosen))])


def _tells_kinds(values: list[Any]) -> bool:
    """Whether a per-layer list names kinds of layers; one of many different values refers to layers by number."""
    return len({str(value) for value in values}) <= 8


def _is_by_layer(value: Mapping[str, Any]) -> bool:
    return bool(value) and all(str(key).isdigit() and isinstance(entry, dict) for key, entry in value.items())


def _small_layer(fields: Mapping[str, Any], entry: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """What one layer has differently from the model."""
    own = {key: _small(key, value) for key, value in entry.items()}
    return {**own, **_related({**fields, **entry}, {**small, **own})}


def _small(key: str, value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(entry, int) for entry in value):
        return [_small(key.removesuffix("s"), entry) for entry in value]
    for pattern, count in _COUNTS:
        if re.fullmatch(pattern, key) and (value is None or isinstance(value, int)):
            return count
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        for pattern, most in _SIZES:
            if re.fullmatch(pattern, key):
                return min(value, most)
    return value


_NOT_FIELDS = {"model_type", "architectures", "transformers_version", "dtype", "_name_or_path"}

_COUNTS: tuple[tuple[str, int], ...] = (
    (r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k", 2),
    (r"(moe_)?num_(local_|routed_)?experts|n_routed_experts", 8),
    (r"moe_intermediate_size", 24),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
)
"""Fields that are set whatever their default, which may be None."""

_SIZES: tuple[tuple[str, int], ...] = (
    (r"(un)?(padded_)?vocab_size.*", 97),
    (r"moe_hidden_size|.*latent_size", 24),
    (r".*moe_intermediate_size", 24),
    (r".*shared.*intermediate_size", 20),
    (r".*intermediate_size|mlp_dim|.*ffn_dim", 40),
    (
        r".*hidden_size.*|d_model|.*embed_dim|hidden_dim|.*(in|out|output)_dim|adapter_input_size|output_channels|downsample_channel",
        32,
    ),
    (r".*shared_experts", 1),
    (r"n_group|num_expert_group|n_groups", 2),
    (r"topk_group", 1),
    (r".*(num|attention|query)_heads|.*_n_heads|.*num_(key|value)_heads", 4),
    (r".*num_key_value_heads|num_kv_heads", 2),
    (r".*head_dim|mamba_d_head|d_rel", 16),
    (r".*rank", 16),
    (r"sliding_window(_size)?|rel_extent", 8),
    (r"index_topk", 8),
    (r"index_kpool", 4),
    (r".*chunk_size|block_size", 8),
    (r"max_position_embeddings|model_max_length", 128),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"depth|encoder_layers", 1),
    (r"depths", 1),
)

_MROPE = {"rope_type": "default", "rope_theta": 1e4}

SPECIAL: dict[str, dict[str, Any]] = {
    # No default where every published config has a value.
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "unlimited_ocr_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots1": {"n_shared_experts": 1},
    "hunyuan_v1_moe": {"head_dim": 16},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 90},
    "qwen3_omni_moe": {"enable_audio_output": False},
    # The convolutions' channels times what is left of the mel bins.
    "dots3_note_audio": {"conv_output_size": 512},
    # One layer kind compresses 128 tokens into one, more than a test has.
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    # Experts are an option, off by default.
    "gemma4_text": {"enable_moe_block": True},
    # The published large ones compute experts in a narrower space than the router sees.
    "nemotron_h": {"moe_latent_size": 24},
    # One attention layer and two dense ones within four.
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 1},
    # The only number of experts per token it takes.
    "zaya": {"num_experts_per_tok": 1},
    # Sections must add up to half the rotated size of a head.
    "glm4v_moe_text": {
        "head_dim": 16,
        "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
    },
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}},
    "hy_v4_vl_text": {"rope_parameters": {**_MROPE, "mrope_section": [2, 3, 3]}},
    # The indexer and the n-gram embedding are on in published configs and have no defaults.
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 20,
        "split_ngram_parts": 1,
        "make_ngram_vocab_size_divisible_by": 4,
        "number_of_conv_states": 3,
    },
}
"""By the config's own model type: fields whose value follows from others, or that have none by default."""

STOCK_LOSES_KEYS: dict[str, str] = {
    "laguna": "mlp.shared_expert. is a pattern, whose dot takes the s of mlp.shared_experts.",
    "mistral_large4": "experts and router get a second mlp. before them",
    "deepseek_ocr2": "layers. gets a second language_model. before it",
    "unlimited_ocr": "layers. gets a second language_model. before it",
}
"""Where stock PEFT cannot load any adapter on these parts, its own included: it renames keys as if they came from the
original checkpoint (peft/utils/transformers_weight_conversion.py), with patterns that match the right names too."""
