#!/usr/bin/env bash
# An adapter with a pair of factors for each projection of each expert (as transformers 4 had experts, and as servers and
# other toolkits still write them) is joined into stacks when peft 0.21.2 opens it on transformers 5.23.0. Of gate and up
# it makes one pair of twice the rank, and it doubles alpha, so that alpha over rank stays. rsLoRA divides alpha by the
# root of the rank instead: with use_rslora the gate and up of every expert change by 1.41 times what was trained, down by
# what was trained. Nothing is said of it.
# Follows: such an adapter answers otherwise than where it was trained, and a merge of it is wrong. Write alpha as
# lora_alpha * sqrt(2) into alpha_pattern, or fold the scaling into B and store it without rsLoRA.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

print({name: version(name) for name in ("peft", "transformers", "torch")})
hidden, width, experts, rank, alpha = 32, 16, 4, 8, 16
config = Qwen3MoeConfig(
    vocab_size=32, hidden_size=hidden, moe_intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, num_experts=experts, num_experts_per_tok=2,
)
shapes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
stack = "model.layers.0.mlp.experts"
torch.manual_seed(0)
tensors = {}
for expert in range(experts):
    for part, (inputs, outputs) in shapes.items():
        name = f"base_model.model.{stack}.{expert}.{part}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs)
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank)
save_file(tensors, "adapter_model.safetensors")


def change(*parts):
    """B·A of each expert, without the scaling."""
    return torch.stack([
        torch.cat([
            tensors[f"base_model.model.{stack}.{expert}.{part}.lora_B.weight"]
            @ tensors[f"base_model.model.{stack}.{expert}.{part}.lora_A.weight"]
            for part in parts
        ])
        for expert in range(experts)
    ])


found = {}
for use_rslora in (False, True):
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": use_rslora}
    Path("adapter_config.json").write_text(json.dumps({**fields, "target_modules": list(shapes)}))
    model = Qwen3MoeForCausalLM(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, ".").merge_and_unload().state_dict()
    wanted = alpha / (rank**0.5 if use_rslora else rank)
    for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        got, told = merged[f"{stack}.{name}"] - before[f"{stack}.{name}"], wanted * change(*parts)
        found[use_rslora, name] = float((got * told).sum() / (told * told).sum())
        assert torch.allclose(got, found[use_rslora, name] * told, atol=1e-3), "another factor, nothing else"
        print(f"use_rslora={use_rslora} {name}: {found[use_rslora, name]:.4f} times what was trained")
assert all(abs(found[key] - 1) < 1e-4 for key in found if key != (True, "gate_up_proj"))
assert abs(found[True, "gate_up_proj"] - 2**0.5) < 1e-3
print("seen: with use_rslora the change of gate and up grows by the root of 2 when the adapter is opened")
PYTHON
