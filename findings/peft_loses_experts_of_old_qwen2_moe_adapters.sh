#!/usr/bin/env bash
# peft 0.21.2 on transformers 5.23.0 opens adapters that were trained while experts were single linears: it has a table of
# old names for the two kinds of families, "mixtral" and "qwen2_moe". Which family is of which kind it asks transformers,
# whose list holds the others (Qwen3-MoE, OLMoE, DeepSeek …) and not qwen2_moe itself; for Mixtral PEFT adds the line
# that lacks, for Qwen2-MoE it does not. So of an adapter for Qwen1.5-MoE or Qwen2-57B-A14B the attention and the shared
# expert come back, and all of the routed experts stay as the base has them. No message tells.
# Follows: an old adapter of such a model works by halves. Give the experts' names in target_parameters yourself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" - <<'PYTHON'
import json
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

print({name: version(name) for name in ("peft", "transformers", "torch")})
torch.manual_seed(0)
parts = {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}
fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", *parts]}
Path("adapter_config.json").write_text(json.dumps(fields))
moved = {}
for family in ("qwen3_moe", "qwen2_moe"):
    config = AutoConfig.for_model(
        family, vocab_size=32, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        shared_expert_intermediate_size=16,
    )
    model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for expert in range(4):
        for part, (inputs, outputs) in parts.items():
            name = f"base_model.model.model.layers.0.mlp.experts.{expert}.{part}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, inputs)
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 4)
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors |= {f"{query}.lora_A.weight": torch.randn(4, 32), f"{query}.lora_B.weight": torch.randn(32, 4)}
    save_file(tensors, "adapter_model.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        after = PeftModel.from_pretrained(model, ".").merge_and_unload().state_dict()
    moved[family] = {name.rpartition(".layers.0.")[2] for name in before if not torch.equal(before[name], after[name])}
    print(family, "changes by the adapter:", sorted(moved[family]))
    lost = [str(one.message) for one in heard if "experts" in str(one.message) and "shared" not in str(one.message)]
    print("  said of its experts:", lost)
    assert family == "qwen3_moe" or not lost
experts = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
assert experts <= moved["qwen3_moe"]
assert moved["qwen2_moe"] == {"self_attn.q_proj.weight"}
print("seen: the routed experts' part of an old adapter is lost in the family after which its names are called")
PYTHON
