"""Tiny models as GGUF files, written out by hand as llama.cpp's converter does it.

The `gguf` library's own writer writes them. Names, permutations, splits and offsets are written out here, for five
families and one with linear attention. Source: `conversion/` of llama.cpp (in llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from tests.harness.families import build
from toolkit.checkpoint.formats.gguf_metadata import add_metadata

__all__ = ["CONFIGS", "Tensors", "add_vocabulary", "as_llama_cpp", "metadata_of", "stored", "tiny", "write_gguf"]

Tensors = dict[str, np.ndarray]
F32 = gguf.GGMLQuantizationType.F32

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "vocab_size": 64, "max_position_embeddings": 128,
          "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}  # fmt: skip
_LATENT = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
           "qk_rope_head_dim": 16, "v_head_dim": 32, "first_k_dense_replace": 1, "n_routed_experts": 8,
           "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32,
           "intermediate_size": 96}  # fmt: skip
CONFIGS: Mapping[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 32, "moe_intermediate_size": 32, "intermediate_size": 96, "num_experts": 8,
                  "num_experts_per_tok": 2, "norm_topk_prob": True},
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "deepseek_v3": {**_LATENT, "num_experts_per_tok": 2, "routed_scaling_factor": 1.5},
    "gpt_oss": {"head_dim": 32, "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2,
                "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4_moe": {"head_dim": 32, "moe_intermediate_size": 32, "intermediate_size": 96, "n_routed_experts": 8,
                 "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "attention_bias": True,
                 "use_qk_norm": True, "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 0},
    "qwen3_5_moe_text": {"head_dim": 32, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
                         "num_experts": 8, "num_experts_per_tok": 2, "linear_num_key_heads": 2,
                         "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32,
                         "layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip
"""By model type: small sizes, each a multiple of 32 where a block type runs along it."""

_ARCHITECTURES = {"qwen3_moe": "qwen3moe", "mixtral": "llama", "deepseek_v3": "deepseek2", "gpt_oss": "gpt-oss",
                  "glm4_moe": "glm4moe", "qwen3_5_moe_text": "qwen35moe"}  # fmt: skip

_NAMES: Mapping[str, str] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.sinks": "attn_sinks.weight",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
"""Parts of a model and their names over there; the rest of a name, `.weight` or `.bias`, stays."""

_AFTER_ATTENTION = {"gpt_oss": "post_attention_norm", "glm4_moe": "post_attention_norm",
                    "qwen3_5_moe_text": "post_attention_norm"}  # fmt: skip


def tiny(model_type: str, **changed: Any) -> PreTrainedModel:
    """A tiny random model in fp32."""
    return build(CONFIG_MAPPING[model_type](**{**_SIZES, **CONFIGS[model_type], **changed}))


def as_llama_cpp(model: PreTrainedModel) -> Tensors:
    """The model's tensors as the converter writes them, in fp32."""
    result: Tensors = {}
    for name, tensor in model.state_dict().items():
        for key, value in _converted(model, name, tensor.float()).items():
            result[key] = value.contiguous().numpy()
    return result


def _converted(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    config, kind = model.config, model.config.model_type
    if name in _NAMES:
        return {_NAMES[name]: tensor + 1 if kind == "qwen3_5_moe_text" and "norm" in name else tensor}
    layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
    block = f"blk.{layer}."
    if rest.startswith("mlp.experts."):
        return {block + key: value for key, value in _experts(kind, rest.removeprefix("mlp.experts."), tensor).items()}
    if rest == "self_attn.kv_b_proj.weight":
        heads = tensor.view(config.num_attention_heads, -1, tensor.shape[1])
        keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return {f"{block}attn_k_b.weight": keys.transpose(1, 2), f"{block}attn_v_b.weight": values}
    part, _, leaf = rest.rpartition(".")
    known = _NAMES.get(rest) or f"{_NAMES[part]}.{leaf}"
    if known == "ffn_norm.weight" and kind in _AFTER_ATTENTION:
        known = f"{_AFTER_ATTENTION[kind]}.weight"
    if kind == "mixtral" and known.startswith(("attn_q.", "attn_k.")):
        heads = config.num_attention_heads if known.startswith("attn_q.") else config.num_key_value_heads
        tensor = tensor.reshape(heads, 2, len(tensor) // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    if kind == "qwen3_5_moe_text":
        tensor = _linear_attention(config, known, tensor)
    return {block + known: tensor}


def _experts(kind: str, rest: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if kind == "gpt_oss":
        leaf = "bias" if rest.endswith("_bias") else "weight"
        tensor = tensor if leaf == "bias" else tensor.transpose(1, 2)
        if rest.startswith("down"):
            return {f"ffn_down_exps.{leaf}": tensor}
        return {f"ffn_gate_exps.{leaf}": tensor[:, ::2], f"ffn_up_exps.{leaf}": tensor[:, 1::2]}
    if rest == "down_proj":
        return {"ffn_down_exps.weight": tensor}
    half = tensor.shape[1] // 2
    return {"ffn_gate_exps.weight": tensor[:, :half], "ffn_up_exps.weight": tensor[:, half:]}


def _linear_attention(config: Any, known: str, tensor: torch.Tensor) -> torch.Tensor:
    """Norms with their one, and value heads tiled: the first of each key head, then the second of each, and so on."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    order = torch.arange(values).reshape(keys, values // keys).T.flatten()
    size, before = config.linear_value_head_dim, 2 * keys * config.linear_key_head_dim
    rows = (order[:, None] * size + torch.arange(size)).flatten()
    if known in ("ssm_alpha.weight", "ssm_beta.weight", "ssm_dt.bias"):
        return tensor[order]
    if known == "ssm_a":
        return -tensor[order].exp()
    if known in ("attn_qkv.weight", "ssm_conv1d.weight"):
        tensor = tensor.squeeze()
        return torch.cat([tensor[:before], tensor[before:][rows]])
    if known == "attn_gate.weight":
        return tensor[rows]
    if known == "ssm_out.weight":
        return tensor[:, rows]
    if known.endswith("norm.weight") and known != "ssm_norm.weight":
        return tensor + 1
    return tensor.squeeze(0) if known == "ffn_gate_inp_shexp.weight" else tensor


def metadata_of(model: PreTrainedModel) -> dict[str, Any]:
    """What the converter writes of the config, without the architecture before each key."""
    config = model.config
    latent = hasattr(config, "kv_lora_rank")
    rope = config.rope_parameters
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1 if latent else config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "expert_count": next(v for k in ("num_experts", "n_routed_experts") if (v := getattr(config, k, None))),
        "expert_used_count": config.num_experts_per_tok,
        "feed_forward_length": getattr(config, "intermediate_size", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_count": getattr(config, "n_shared_experts", None),
        "expert_group_count": getattr(config, "n_group", None),
        "expert_group_used_count": getattr(config, "topk_group", None),
        "attention.sliding_window": getattr(config, "sliding_window", None),
    }
    if hasattr(config, "routed_scaling_factor"):
        found |= {"expert_weights_scale": config.routed_scaling_factor, "expert_weights_norm": config.norm_topk_prob}
    if latent:
        found |= {
            "attention.q_lora_rank": config.q_lora_rank,
            "attention.kv_lora_rank": config.kv_lora_rank,
            "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
            "attention.value_length_mla": config.v_head_dim,
            "rope.dimension_count": config.qk_rope_head_dim,
        }
    else:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotated = int(head * rope.get("partial_rotary_factor", 1.0))
        found |= {"attention.key_length": head, "rope.dimension_count": rotated}
    if rope["rope_type"] == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": rope["beta_fast"],
            "rope.scaling.yarn_beta_slow": rope["beta_slow"],
        }
    if hasattr(config, "linear_num_key_heads"):
        found |= {
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        }
    return {key: value for key, value in found.items() if value is not None}


def add_vocabulary(
    writer: gguf.GGUFWriter, folder: Path, kind: str = "gpt2", split: str = "gpt-2", **changed: Any
) -> None:
    """A byte-level tokenizer and its chat template as the converter writes them.

    Args:
        changed: merges or eos, instead of the tokenizer's.
    """
    model = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in model["added_tokens"]}
    tokens = sorted(model["model"]["vocab"], key=model["model"]["vocab"].get)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(changed.get("merges", [" ".join(pair) for pair in model["model"]["merges"]]))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(changed.get("eos", 2))
    writer.add_pad_token_id(0)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def stored(tensors: Tensors, kind: gguf.GGMLQuantizationType) -> Tensors:
    """The tensors after that block type's rounding, where the converter would round them."""
    return {
        name: gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind) if _is_rounded(name, value) else value
        for name, value in tensors.items()
    }


def _is_rounded(name: str, value: np.ndarray) -> bool:
    return value.ndim > 1 and value.shape[-1] % 32 == 0 and not re.search(r"norm|gate_inp|conv1d|\.bias$", name)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tensors: Tensors | None = None,
    kind: gguf.GGMLQuantizationType = F32,
    raw: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    edit: Callable[[dict[str, Any]], object] = lambda metadata: None,
    vocabulary: Path | None = None,
    licence: str | None = None,
    **splits: Any,
) -> Path:
    """Write the model to `path`.

    Args:
        tensors: instead of all of the model's. kind: of those that the converter would round.
        raw: blocks of a tensor and their type, instead of its numbers. edit: changes the metadata.
        vocabulary: a folder with a tokenizer, which the file is to hold. licence: what it says of it.
    """
    architecture = _ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(str(path), architecture, **splits)
    metadata = metadata_of(model)
    edit(metadata)
    add_metadata(writer, architecture, metadata)
    if licence:
        writer.add_license(licence)
    if vocabulary:
        add_vocabulary(writer, vocabulary)
    for name, value in (as_llama_cpp(model) if tensors is None else tensors).items():
        if raw and name in raw:
            writer.add_tensor(name, raw[name][0], raw_dtype=raw[name][1])
        elif kind != F32 and _is_rounded(name, value):
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
