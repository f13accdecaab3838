"""The families of the tiny checkpoints: config.json as published, and the names and shapes of the tensors.

One tensor a linear, experts by number; gpt-oss alone has them fused.
"""

from __future__ import annotations

from typing import Any

__all__ = ["FAMILIES", "HIDDEN", "WIDTH", "shapes"]

HIDDEN, WIDTH, EXPERTS, LAYERS, WORDS = 64, 32, 4, 2, 101
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 1e4}
_SHARED = {
    **_ATTENTION,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "vocab_size": WORDS,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_SHARED,
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 16,
        "num_experts": EXPERTS,
        "moe_intermediate_size": WIDTH,
        "intermediate_size": 96,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "mixtral": {
        **_SHARED,
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": EXPERTS,
        "intermediate_size": WIDTH,
        "sliding_window": None,
    },
    "deepseek_v2": {
        **_SHARED,
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 32,
        "v_head_dim": 16,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "moe_intermediate_size": WIDTH,
        "intermediate_size": 96,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 32,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "glm4_moe": {
        **_SHARED,
        "architectures": ["Glm4MoeForCausalLM"],
        "head_dim": 16,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "moe_intermediate_size": WIDTH,
        "intermediate_size": 96,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
    },
    "gpt_oss": {
        **_SHARED,
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "head_dim": 16,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "intermediate_size": WIDTH,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 7.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
}
"""config.json of each family, without its model_type."""


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the family's published layout by its whole name; linears are [outputs, inputs]."""
    config = FAMILIES[family]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        found |= {f"{at}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        found |= _attention(family, at + "self_attn.")
        found |= _mixture(family, at) if layer >= config.get("first_k_dense_replace", 0) else _mlp(at + "mlp.", 96)
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}


def _attention(family: str, at: str) -> dict[str, tuple[int, ...]]:
    if family == "deepseek_v2":
        found: dict[str, tuple[int, ...]] = {
            "q_proj.weight": (4 * 48, HIDDEN),
            "kv_a_proj_with_mqa.weight": (32 + 32, HIDDEN),
            "kv_a_layernorm.weight": (32,),
            "kv_b_proj.weight": (4 * 32, 32),
            "o_proj.weight": (HIDDEN, 4 * 16),
        }
    else:
        outputs = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": HIDDEN}
        found = {f"{name}.weight": (size, HIDDEN) for name, size in outputs.items()}
        if family == "gpt_oss":
            found |= {"sinks": (4,), **{f"{name}.bias": (size,) for name, size in outputs.items()}}
        elif family != "mixtral":
            found |= {"q_norm.weight": (16,), "k_norm.weight": (16,)}
    return {at + name: shape for name, shape in found.items()}


def _mixture(family: str, at: str) -> dict[str, tuple[int, ...]]:
    if family == "gpt_oss":
        found: dict[str, tuple[int, ...]] = {
            "router.weight": (EXPERTS, HIDDEN),
            "router.bias": (EXPERTS,),
            "experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * WIDTH),
            "experts.gate_up_proj_bias": (EXPERTS, 2 * WIDTH),
            "experts.down_proj": (EXPERTS, WIDTH, HIDDEN),
            "experts.down_proj_bias": (EXPERTS, HIDDEN),
        }
        return {f"{at}mlp.{name}": shape for name, shape in found.items()}
    at += "block_sparse_moe." if family == "mixtral" else "mlp."
    found = {f"{at}gate.weight": (EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        found |= _mlp(f"{at}experts.{expert}.", WIDTH, names)
    if family in {"deepseek_v2", "glm4_moe"}:
        found |= _mlp(f"{at}shared_experts.", WIDTH)
    return {**found, **({f"{at}gate.e_score_correction_bias": (EXPERTS,)} if family == "glm4_moe" else {})}


def _mlp(
    at: str, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, tuple[int, ...]]:
    gate, up, down = (f"{at}{name}.weight" for name in names)
    return {gate: (width, HIDDEN), up: (width, HIDDEN), down: (HIDDEN, width)}
