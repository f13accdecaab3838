"""Tiny random MoE checkpoints of the families that the shipped recipes name, and the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from toolkit.quant.gptq import search

EMBEDDED = Path(__file__).parents[2] / "recipes" / "quickstart" / "nano-qwen3moe-2m"

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "topk_group": 1}
_SHARED = {"n_routed_experts": 4, "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [0],
    },
    "deepseek_v2": {**_LATENT, **_SHARED, "q_lora_rank": None, "n_group": 1},
    "deepseek_v3": {**_LATENT, **_SHARED, "q_lora_rank": 16, "n_group": 2},
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
}


@pytest.fixture(scope="session", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights large enough that every part matters."""
    return random_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def random_checkpoint(model_type: str, folder: Path) -> Path:
    """Writes one of `FAMILIES` into a folder."""
    config = CONFIG_MAPPING[model_type](**{**COMMON, **FAMILIES[model_type]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def randomize() -> Callable[[torch.nn.Module], None]:
    """Give every LoRA B random values, so that a lost or misread adapter shows."""

    def fill(model: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    return fill


@pytest.fixture(autouse=True)
def little_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Error compensation looks further on the tiniest matrices only; what a long search finds is for the benchmarks."""
    monkeypatch.setattr(search, "_BUDGET", 1 << 20)
