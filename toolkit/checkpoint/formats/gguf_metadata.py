"""What a GGUF file says of a model beside its tensors: the config's numbers and the tokenizer.

The other way round of `gguf_config` and `gguf_tokenizer`, which then read what was written: whatever a file of that
architecture has no place for shows there, and is refused instead of being left to llama.cpp's defaults.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from toolkit.checkpoint.formats.gguf_config import FIELDS, ROPE
from toolkit.checkpoint.formats.gguf_file import library
from toolkit.errors import ModelError
from toolkit.families import GGUF_SIGMOID, GGUF_WRITTEN

__all__ = ["add_metadata", "add_vocabulary", "config_differences", "metadata_of"]

_COMMON = (
    *("context_length", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv"),
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "expert_count", "expert_used_count"),
)
_DENSE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_SOFTMAX, _SIGMOID = 1, 2
_FLOATS = ("scale", "epsilon", "factor", "freq_base", "beta_fast", "beta_slow", "multiplier", "clamp_kqv")


def metadata_of(config: PretrainedConfig, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config's numbers by key, without the architecture before each.

    Args:
        config: of the text model. architecture: llama.cpp's name, one of `GGUF_WRITTEN`. shapes: of the file's tensors.
    """
    wanted = {*_COMMON, *GGUF_WRITTEN[architecture].split()}
    found: dict[str, Any] = {"block_count": config.num_hidden_layers, "vocab_size": config.vocab_size}
    for key, places in FIELDS:
        held = [value for field in places.split() if (value := getattr(config, field, None)) is not None]
        if key in wanted and held:
            found[key] = held[0]
    if "attention.layer_norm_rms_epsilon" in found and not hasattr(config, "layer_norm_eps"):
        found.pop("attention.layer_norm_epsilon", None)
    dense = [getattr(config, name, None) for name in _DENSE]
    if kinds := getattr(config, "mlp_layer_types", None):
        dense = [next((number for number, kind in enumerate(kinds) if kind != "dense"), len(kinds))]
    shared = [shape[-1] for name, shape in shapes.items() if name.endswith(".ffn_down_shexp.weight")]
    others = {
        "leading_dense_block_count": next((value for value in dense if value is not None), None),
        "attention.sliding_window": getattr(config, "sliding_window", None) or None,
        "attention.q_lora_rank": getattr(config, "q_lora_rank", None),
        "expert_shared_feed_forward_length": next(iter(shared), None),
        "expert_gating_func": _SIGMOID if config.model_type in GGUF_SIGMOID else _SOFTMAX,
    }
    found |= {key: value for key, value in others.items() if key in wanted and value is not None}
    return {key: _typed(key, value) for key, value in {**found, **_heads(config), **dict(_rope(config))}.items()}


def _heads(config: PretrainedConfig) -> dict[str, int]:
    """Sizes of heads, and how much of them is rotated."""
    if (rank := getattr(config, "kv_lora_rank", None)) is not None:
        rotated = config.qk_rope_head_dim
        return {
            "attention.head_count_kv": 1,
            "attention.key_length": rank + rotated,
            "attention.value_length": rank,
            "attention.key_length_mla": config.qk_nope_head_dim + rotated,
            "attention.value_length_mla": config.v_head_dim,
            "rope.dimension_count": rotated,
        }
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(size * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))
    return {"attention.key_length": size, "attention.value_length": size, "rope.dimension_count": rotated}


def _rope(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    rope = config.rope_parameters or {}
    if "rope_theta" in rope:
        yield "rope.freq_base", rope["rope_theta"]
    if rope.get("rope_type") not in ("linear", "yarn"):
        return
    yield "rope.scaling.type", rope["rope_type"]
    for key, place in ROPE:
        if rope.get(place) is not None and key != "attn_factor":
            yield f"rope.scaling.{key}", rope[place]
    if rope.get("mscale_all_dim"):
        yield "rope.scaling.yarn_log_multiplier", 0.1 * rope["mscale_all_dim"]


def _typed(key: str, value: Any) -> Any:
    return float(value) if key.endswith(_FLOATS) else value


def add_metadata(writer: Any, architecture: str, metadata: Mapping[str, Any]) -> None:
    """Give the keys to a `GGUFWriter`, each in the type that it has there."""
    for key, value in metadata.items():
        name = f"{architecture}.{key}"
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case _:
                writer.add_array(name, value)


_IGNORED = frozenset(
    {
        *(
            "architectures",
            "dtype",
            "torch_dtype",
            "transformers_version",
            "_name_or_path",
            "name_or_path",
            "model_type",
        ),
        *("initializer_range", "use_cache", "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "output_router_logits", "router_aux_loss_coef"),
        *("aux_loss_alpha", "seq_aux", "router_jitter_noise", "quantization_config", "num_nextn_predict_layers"),
        *("pretraining_tp", "max_window_layers", "use_sliding_window", "ep_size", "router_z_loss_coef"),
    }
)
"""Fields that a forward pass without training does not look at, or that say how layers of another kind are counted."""


def config_differences(wanted: PretrainedConfig, found: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that a model computes by and that two configs of one type do not agree on, with both values."""
    one, other = (_normal(config) for config in (wanted, found))
    known = type(wanted)().to_dict().keys() | {"head_dim"}  # of what else a config says, transformers takes no notice
    names = sorted((one.keys() | other.keys()) & known - _IGNORED)
    differ = {name: (one.get(name), other.get(name)) for name in names if not _same(one.get(name), other.get(name))}
    if "mlp_layer_types" in one or "mlp_only_layers" in one:  # by these it says which layers have experts
        for name in ("decoder_sparse_step", "intermediate_size"):
            differ.pop(name, None)
    return differ


def _normal(config: PretrainedConfig) -> dict[str, Any]:
    """Its fields, with what a default means written out."""
    fields = {**config.to_dict()}
    if "kv_lora_rank" not in fields:
        fields["head_dim"] = fields.get("head_dim") or config.hidden_size // config.num_attention_heads
    if fields.get("rope_parameters"):
        fields["rope_parameters"] = {"partial_rotary_factor": 1.0, **fields["rope_parameters"]}
    if "moe_layer_end_index" in fields:
        last = config.num_hidden_layers - 1
        told = fields["moe_layer_end_index"]
        fields["moe_layer_end_index"] = last if told == -1 else min(told, last)
    kinds = set(fields.get("layer_types") or ())
    if kinds == {"full_attention"} or (not kinds and fields.get("use_sliding_window") is False):
        fields["sliding_window"] = None
    return fields


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_same(one.get(key), other.get(key)) for key in one.keys() | other.keys())
    if isinstance(one, float) or isinstance(other, float):
        numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
        return numbers and abs(one - other) <= 1e-6 * max(abs(one), abs(other))
    return bool(one == other)


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int, pre: str) -> None:
    """Give a byte-level vocabulary to a `GGUFWriter`, with `pre`, llama.cpp's name of how it splits text.

    Args:
        size: rows of the embedding; those without a token are filled up.

    Raises:
        ModelError: the tokenizer is of another kind.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(backend["pre_tokenizer"]):
        raise ModelError(
            "gguf-merged: this tokenizer is not byte-level BPE, and no other kind can be written here without losing "
            "something: give a GGUF file of the base with --base-gguf"
        )
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = library().TokenType
    tokens = [words.get(number, f"[PAD{number}]") for number in range(max(size, max(words) + 1))]
    types = [_kind(kinds, number, words, added) for number in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]])
    roles = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for role, give in roles.items():
        if (number := getattr(tokenizer, f"{role}_token_id")) is not None:
            give(number)
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    begins = len(whole) > len(bare) and whole[0] == tokenizer.bos_token_id
    writer.add_add_bos_token(begins)
    if whole != ([tokenizer.bos_token_id] if begins else []) + bare:
        writer.add_add_eos_token(whole[-1] == tokenizer.eos_token_id)


def _kind(kinds: Any, number: int, words: Mapping[int, str], added: Mapping[int, Any]) -> int:
    if number not in words:
        return int(kinds.UNUSED)
    if number not in added:
        return int(kinds.NORMAL)
    return int(kinds.CONTROL if added[number].special else kinds.USER_DEFINED)
