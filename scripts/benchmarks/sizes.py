#!/usr/bin/env python3
"""Bytes of the models that the recipes name: fp32, bf16 and ours, from their published configurations alone.

    .venv/bin/python scripts/benchmarks/sizes.py [--json]

No weights and no network: each model is built on the meta device. The values are those of `config.json` in each
repository; the parameter count beside them, as its card states it, shows that they describe the right model.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.architecture import describe
from toolkit.plan import Part
from toolkit.plan.audit import parts_of

MODELS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "allenai/OLMoE-1B-7B-0924-Instruct": (
        "olmoe",
        6.92,
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
         "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 1024, "vocab_size": 50304},
    ),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": (
        "qwen2_moe",
        14.3,
        {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
         "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "intermediate_size": 5632,
         "shared_expert_intermediate_size": 5632, "vocab_size": 151936},
    ),
    "deepseek-ai/DeepSeek-V2-Lite-Chat": (
        "deepseek_v2",
        15.7,
        {"hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
         "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
         "intermediate_size": 10944, "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None,
         "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 102400},
    ),
    "openai/gpt-oss-20b": (
        "gpt_oss",
        20.9,
        {"hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
         "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 2880,
         "vocab_size": 201088},
    ),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": (
        "qwen3_moe",
        30.5,
        {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
         "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
         "intermediate_size": 6144, "vocab_size": 151936},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """GB of one model, and what share of their fp32 bytes the experts and the whole take in 8 bit."""

    model: str
    parameters: int
    stated_billions: float
    fp32: float
    bf16: float
    ours: float
    experts_share: float
    whole_share: float


def measure(name: str) -> Sizes:
    """Count one model."""
    family, stated, values = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    parts = parts_of(model, describe(model))
    parameters, stored = sum(part.parameters for part in parts), sum(part.bytes for part in parts)
    experts: Part = parts[0]
    return Sizes(
        name,
        parameters,
        stated,
        4 * parameters / 1e9,
        2 * parameters / 1e9,
        stored / 1e9,
        experts.bytes / (4 * experts.parameters),
        stored / (4 * parameters),
    )


def main() -> None:
    """Print the table."""
    rows = [measure(name) for name in MODELS]
    if "--json" in sys.argv:
        print(json.dumps([vars(row) for row in rows], indent=2))
        return
    print(f"{'model':36} {'billions':>9} {'stated':>7} {'fp32 GB':>8} {'bf16 GB':>8} {'ours GB':>8}  experts   whole")
    for row in rows:
        print(
            f"{row.model:36} {row.parameters / 1e9:9.2f} {row.stated_billions:7.1f} {row.fp32:8.1f} {row.bf16:8.1f} "
            f"{row.ours:8.1f} {row.experts_share:8.2%} {row.whole_share:7.2%}"
        )


if __name__ == "__main__":
    main()
