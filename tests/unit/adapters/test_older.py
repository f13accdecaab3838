"""Adapters with an expert's projections as linears of their own, as transformers 4 had them and servers still do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.adapters import load_adapter

HIDDEN, WIDTH, EXPERTS, RANK, ALPHA = 16, 8, 3, 4, 8


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, ALPHA / RANK), (True, ALPHA / RANK**0.5)])
def test_gate_and_up_keep_their_scaling_where_they_become_one_stack(
    tmp_path: Path, use_rslora: bool, scaling: float
) -> None:
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=16, hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=EXPERTS, num_experts_per_tok=2,
    )  # fmt: skip
    stack = "model.layers.0.mlp.experts"
    tensors = {}
    for expert in range(EXPERTS):
        for part, inputs, outputs in (
            ("gate_proj", HIDDEN, WIDTH), ("up_proj", HIDDEN, WIDTH), ("down_proj", WIDTH, HIDDEN)
        ):  # fmt: skip
            tensors[f"{stack}.{expert}.{part}.lora_A"] = torch.randn(RANK, inputs)
            tensors[f"{stack}.{expert}.{part}.lora_B"] = torch.randn(outputs, RANK)
    save_file({f"base_model.model.{k}.weight": v for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": use_rslora}
    fields["target_modules"] = ["gate_proj", "up_proj", "down_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))

    down = load_adapter(AutoModelForCausalLM.from_config(config), tmp_path).get_submodule(f"base_model.model.{stack}")
    deltas = {"down_proj": down, "gate_up_proj": down.base_layer}
    for name, wrapper in deltas.items():
        parts = ("down_proj",) if name == "down_proj" else ("gate_proj", "up_proj")
        wanted = torch.stack(
            [
                torch.cat([tensors[f"{stack}.{e}.{p}.lora_B"] @ tensors[f"{stack}.{e}.{p}.lora_A"] for p in parts])
                for e in range(EXPERTS)
            ]
        )
        torch.testing.assert_close(wrapper.get_delta_weight("default"), scaling * wanted)
