"""A config of transformers from what a GGUF file says of itself: its metadata, and the shapes and names of its tensors.

transformers reads such a config for a few families and takes defaults for what its table lacks, an expert's width among
them. Here every family goes one way: a key of the file has the fields that may hold it, and what tensors show is taken
from them. Whatever is wrong all the same shows when every parameter of that config is looked for in the file.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
)

from toolkit.checkpoint.config import WRONG_CONFIG, in_one_line
from toolkit.checkpoint.formats.gguf_file import GgufFile, Strings
from toolkit.errors import ModelError
from toolkit.families import GGUF_NAMES, GGUF_TAKES_FOR_GRANTED, GGUF_WITH_EXPERTS

__all__ = ["FIELDS", "ROPE", "config_of", "is_named", "model_types"]


@cache
def model_types(architecture: str) -> tuple[str, ...]:
    """transformers' types of text models with experts that llama.cpp calls `architecture`; those of the name first."""
    writing = []
    for name in CONFIG_MAPPING:
        cls = CONFIG_MAPPING[name] if is_named(name, architecture) else None
        is_built = cls in MODEL_FOR_CAUSAL_LM_MAPPING or cls in MODEL_FOR_MULTIMODAL_LM_MAPPING
        if cls and is_built and not cls.sub_configs and _defaults(name).keys() & _COUNTS:
            writing.append(name)
    return tuple(sorted(writing, key=lambda name: (_bare(name) != _bare(architecture), name)))


def is_named(model_type: str, architecture: str) -> bool:
    """Whether a config of this type may belong to a file of this architecture."""
    name = model_type.removesuffix("_text")
    return _bare(GGUF_NAMES.get(name, name)) == _bare(architecture) or GGUF_WITH_EXPERTS.get(architecture) == model_type


def config_of(file: GgufFile, model_type: str) -> PretrainedConfig:
    """The config that `file` describes, as one of `model_type`.

    Raises:
        ModelError: a key is missing or no number, or the file says something that such a config has no place for.
    """
    known = _defaults(model_type)
    facts = _Facts(file)
    fields = {
        **GGUF_TAKES_FOR_GRANTED.get(model_type, {}),
        **dict(_copied(facts, known)),
        **dict(_shown(facts, known)),
        **dict(_attention(facts, known)),
        **dict(_state_space(facts, known)),
    }
    if "rope_parameters" in known and (rope := _rope(facts, known, fields)) is not None:
        fields["rope_parameters"] = rope
    try:
        return AutoConfig.for_model(model_type, **fields)
    except WRONG_CONFIG as error:
        raise ModelError(
            f"{facts.where}: no config of a {model_type} can be made of it: {in_one_line(error)}"
        ) from None


class _Facts:
    """What the file says, by name without its architecture, and checked for being a number."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.where = file, str(file.files[0])
        self.prefix = f"{file.metadata['general.architecture']}."
        self.leaves: dict[int, set[str]] = defaultdict(set)
        for name in file.tensors:
            if match := re.match(r"blk\.(\d{1,4})\.(.+)", name):
                self.leaves[int(match[1])].add(match[2])
        self.layers = -1
        self.layers = self.needed("block_count") - (self.whole("nextn_predict_layers") or 0)
        if self.layers < 1 or not all(number in self.leaves for number in range(min(self.layers, 10**4))):
            raise ModelError(f"{self.where}: not all of its {self.layers} layers are there; download it again")

    def number(self, key: str) -> Any:
        """The number of that key; of a list by layer the one that is not 0. None where there is no such key."""
        value = self.file.metadata.get(self.prefix + key)
        if isinstance(value, np.ndarray):
            values = set(value[: self.layers].tolist()) if len(value) >= self.layers else set()
            value = max(values, default=0) if len(values - {0}) == 1 else "a list of different numbers"
        if isinstance(value, (str, Strings)) or (isinstance(value, (int, float)) and not abs(value) < 2**31):
            raise ModelError(f"{self.where}: {self.prefix}{key} is no number that a config can hold")
        return value

    def whole(self, key: str) -> int | None:
        value = self.number(key)
        return None if value is None else int(value)

    def needed(self, key: str) -> int:
        if (value := self.whole(key)) is None or value < 1:
            raise ModelError(f"{self.where}: it does not say its {self.prefix}{key}; put its config.json beside it")
        return value

    def words(self, key: str) -> str | None:
        value = self.file.metadata.get(self.prefix + key)
        return value if isinstance(value, str) else None

    def bools(self, key: str) -> list[bool] | None:
        value = self.file.metadata.get(self.prefix + key)
        if not isinstance(value, np.ndarray) or len(value) < self.layers:
            return None
        return [bool(entry) for entry in value[: self.layers].tolist()]

    def having(self, pattern: str) -> list[int]:
        """The layers with a tensor of that name."""
        return [n for n in range(self.layers) if any(re.fullmatch(pattern, leaf) for leaf in self.leaves[n])]

    def has(self, pattern: str) -> bool:
        return bool(self.having(pattern))

    def block(self, number: int) -> str:
        """What a layer is that is one thing alone."""
        leaves = self.leaves[number]
        if "ssm_out.weight" in leaves:
            return "linear_attention"
        return "full_attention" if "attn_q.weight" in leaves else "moe" if "ffn_down_exps.weight" in leaves else "mlp"

    def width(self, leaf: str, axis: int) -> int | None:
        """A size of the first tensor of that name in a layer."""
        names = (f"blk.{number}.{leaf}" for number in range(self.layers))
        shape = next((self.file.tensors[name].shape for name in names if name in self.file.tensors), ())
        return shape[axis] if -len(shape) <= axis < len(shape) else None


@cache
def _defaults(model_type: str) -> Mapping[str, Any]:
    """Fields of that config and their defaults; other names that it takes for a field have no default."""
    cls = CONFIG_MAPPING[model_type]
    return {**dict.fromkeys(cls.attribute_map), **cls().to_dict()}


def _copied(facts: _Facts, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, places in FIELDS:
        field = next((name for name in places.split() if name in known), None)
        if field is not None and (value := facts.number(key)) is not None:
            yield field, value
    for token in ("bos", "eos", "pad"):
        key = f"tokenizer.ggml.{'padding' if token == 'pad' else token}_token_id"
        value = facts.file.metadata.get(key)
        yield f"{token}_token_id", value if isinstance(value, int) else None


def _shown(facts: _Facts, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What tensors show by being there, and by their shapes."""
    tensors = facts.file.tensors
    yield "tie_word_embeddings", "output.weight" not in tensors
    yield "num_hidden_layers", facts.layers
    experts = facts.having(r"ffn_down_exps\.weight")
    dense = [number for number in range(facts.layers) if number not in experts]
    of_expert, of_dense = facts.width("ffn_down_exps.weight", -1), facts.width("ffn_up.weight", 0)
    shown = {
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else None,
        "mlp_layer_types": ["dense" if number in dense else "sparse" for number in range(facts.layers)],
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "first_k_dense_replace": len(dense),
        "num_dense_layers": len(dense),
        "moe_layer_start_index": min(experts, default=0),
        "moe_layer_end_index": max(experts, default=0),
        "num_nextn_predict_layers": 0,
        "attention_bias": facts.has(r"attn_(q|q_a)\.bias"),
        "qkv_bias": facts.has(r"attn_q\.bias"),
        "use_bias": facts.has(r"(attn_output|ffn_down|ssm_in)\.bias"),
        "use_qk_norm": facts.has(r"attn_q_norm\.weight"),
        "lm_head_bias": "output.bias" in tensors,
        "use_expert_bias": facts.has(r"exp_probs_b.*"),
        "intermediate_size": of_dense if "moe_intermediate_size" in known else of_expert,
        "moe_intermediate_size": of_expert,
        "shared_expert_intermediate_size": facts.width("ffn_down_shexp.weight", -1),
        "moe_latent_size": facts.width("ffn_latent_down.weight", 0),
    }
    yield from ((field, value) for field, value in shown.items() if field in known and value is not None)
    if "position_embedding_type" in known and facts.number("rope.scaling.finetuned"):
        yield "position_embedding_type", "rope"  # this family's converter says by that key whether there is one
    if "topk_method" in known and (facts.whole("expert_group_count") or 0) > 1:
        yield "topk_method", "group_limited_greedy"


def _attention(facts: _Facts, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Sizes of heads, and which layers attend how."""
    heads = facts.needed("attention.head_count")
    if "kv_lora_rank" in known:
        yield from _latent(facts, known, heads)
    elif size := facts.whole("attention.key_length") or (facts.width("attn_q.weight", 0) or 0) // heads:
        yield "head_dim", size
    if "sliding_window" in known:
        yield "sliding_window", facts.whole("attention.sliding_window") or None
    if "layer_types" in known and (pattern := facts.bools("attention.sliding_window_pattern")):
        yield "layer_types", ["sliding_attention" if slides else "full_attention" for slides in pattern]
    for leaf, kind in ((r"ssm_out\.weight", "linear_attention"), (r"shortconv\.conv\.weight", "conv")):
        if "layer_types" in known and "layers_block_type" not in known and (others := facts.having(leaf)):
            yield "layer_types", [kind if number in others else "full_attention" for number in range(facts.layers)]


def _state_space(facts: _Facts, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Sizes of mixers without attention, and where they stand between layers that attend and layers with experts."""
    if not facts.has(r"ssm_out\.weight"):
        return
    inner, heads = facts.needed("ssm.inner_size"), facts.needed("ssm.time_step_rank")
    sizes = {
        "linear_value_head_dim": inner // heads,
        "mamba_head_dim": inner // heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // facts.needed("embedding_length"),
    }
    yield from ((field, value) for field, value in sizes.items() if field in known)
    if "layers_block_type" in known:
        yield "layers_block_type", [facts.block(number) for number in range(facts.layers)]
    for kind, leaf in (("attn", r"attn_q\.weight"), ("expert", r"ffn_down_exps\.weight")):
        if f"{kind}_layer_period" in known:
            first, *others = facts.having(leaf) or [0]
            yield f"{kind}_layer_offset", first
            yield f"{kind}_layer_period", others[0] - first if others else facts.layers


def _latent(facts: _Facts, known: Mapping[str, Any], heads: int) -> Iterator[tuple[str, Any]]:
    """Latent attention; files from before its second projection was stored in two have no keys of their own for it."""
    rotated = facts.needed("rope.dimension_count")
    whole = facts.whole("attention.key_length_mla") or facts.needed("attention.key_length")
    value = facts.whole("attention.value_length_mla") or facts.needed("attention.value_length")
    yield from {
        "num_key_value_heads": heads,
        "q_lora_rank": facts.whole("attention.q_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": whole - rotated,
        "v_head_dim": value,
    }.items()
    yield from ((field, size) for field, size in (("qk_head_dim", whole), ("head_dim", rotated)) if field in known)


def _rope(facts: _Facts, known: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rotary embedding; None where the file does not speak of one."""
    if (theta := facts.number("rope.freq_base")) is None:
        return None
    if stretched := [name for name in facts.file.tensors if re.search(r"(^|\.)rope_(freqs|factors)", name)]:
        raise ModelError(
            f"{facts.where}: how its rotary embedding is stretched lies in {stretched[0]} and not in the metadata; "
            "put its config.json beside it"
        )
    default = known["rope_parameters"] or {}
    kind = facts.words("rope.scaling.type") or "default"
    kind = "default" if kind == "none" else kind
    rope = {**default} if default.get("rope_type") == kind else {"rope_type": kind}
    rope["rope_theta"] = float(theta)
    head, rotated = fields.get("head_dim"), facts.whole("rope.dimension_count")
    if "kv_lora_rank" not in known and head and rotated and (rotated != head or "partial_rotary_factor" in rope):
        rope["partial_rotary_factor"] = rotated / head
    for key, place in ROPE:
        if kind != "default" and (value := facts.number(f"rope.scaling.{key}")) is not None:
            rope[place] = value
    if kind == "yarn" and (multiplier := facts.number("rope.scaling.yarn_log_multiplier")):
        rope["mscale"] = rope["mscale_all_dim"] = round(10 * multiplier, 6)
    return rope


def _bare(name: str) -> str:
    return name.replace("-", "").replace("_", "")


_COUNTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
"""Fields that count experts; a config without one is of a family that has none."""

FIELDS: tuple[tuple[str, str], ...] = (
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps norm_eps layer_norm_epsilon"),
    ("attention.layer_norm_epsilon", "layer_norm_eps layer_norm_epsilon rms_norm_eps"),
    ("attention.kv_lora_rank", "kv_lora_rank"),
    ("attention.scale", "attention_multiplier"),
    ("attention.clamp_kqv", "clip_qkv"),
    ("attention.indexer.head_count", "index_n_heads"),
    ("attention.indexer.key_length", "index_head_dim"),
    ("attention.indexer.top_k", "index_topk"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
    ("expert_count", "num_experts num_local_experts n_routed_experts moe_num_experts"),
    ("expert_used_count", "num_experts_per_tok moe_k moe_topk"),
    ("expert_feed_forward_length", "moe_intermediate_size intermediate_size"),
    ("expert_shared_feed_forward_length", "shared_intermediate_size moe_shared_expert_intermediate_size"),
    ("expert_shared_count", "n_shared_experts num_shared_experts moe_num_shared_experts"),
    ("expert_group_count", "n_group"),
    ("expert_group_used_count", "topk_group"),
    ("expert_weights_scale", "routed_scaling_factor route_scale"),
    ("expert_weights_norm", "norm_topk_prob route_norm"),
    ("interleave_moe_layer_step", "moe_layer_interval"),
    ("ssm.conv_kernel", "linear_conv_kernel_dim mamba_d_conv conv_kernel"),
    ("ssm.state_size", "linear_key_head_dim mamba_d_state ssm_state_size"),
    ("ssm.group_count", "linear_num_key_heads mamba_n_groups n_groups"),
    ("ssm.time_step_rank", "linear_num_value_heads mamba_n_heads mamba_num_heads mamba_dt_rank"),
    ("shortconv.l_cache", "conv_L_cache"),
)
"""A key of the metadata, and the fields that hold it: the first that a config has. As the converter reads them
(`find_hparam` in llama.cpp's `conversion/base.py`)."""

ROPE = (
    ("factor", "factor"),
    ("original_context_length", "original_max_position_embeddings"),
    ("attn_factor", "attention_factor"),
    ("yarn_attn_factor", "attention_factor"),
    ("yarn_beta_fast", "beta_fast"),
    ("yarn_beta_slow", "beta_slow"),
)
"""Keys of a stretched rotary embedding."""
