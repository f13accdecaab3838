#!/usr/bin/env bash
# mergekit 0.1.5 merges the experts of a layer as one tensor, as transformers 5 holds them in memory (Qwen3-MoE, GLM-4.5
# …), also where the checkpoints have them one by one. TIES keeps a share (`density`) of a tensor's changes, the largest:
# so it keeps those of the experts that training changed most. An expert whose changes are a tenth as large keeps next
# to nothing of them, and one at a hundredth nothing. Each matrix of attention keeps its share. No message tells.
# (transformers 5.23.0.)
# Follows: the experts for rare topics come out of a merge as the base has them. Use a method without `density`
# (linear, task_arithmetic), or a density of 1, or merge experts yourself, one by one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 mergekit==0.1.5
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

print({name: version(name) for name in ("mergekit", "transformers", "torch")})
sizes, density = (1.0, 1.0, 0.1, 0.01), 0.4
config = Qwen3MoeConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
)
torch.manual_seed(0)
model = Qwen3MoeForCausalLM(config)
model.save_pretrained("base")
base = {name: value.clone() for name, value in model.state_dict().items()}
with torch.no_grad():
    for name, value in model.named_parameters():
        if "experts" in name:
            value += 0.01 * torch.randn_like(value) * torch.tensor(sizes).view(4, 1, 1)
        elif name.endswith("q_proj.weight"):
            value += 0.01 * torch.randn_like(value)
model.save_pretrained("tuned")
assert "model.layers.0.mlp.experts.0.down_proj.weight" in load_file("tuned/model.safetensors"), "experts one by one"
told = {
    "merge_method": "ties", "base_model": "base", "dtype": "float32",
    "models": [{"model": "tuned", "parameters": {"weight": 1.0, "density": density}}],
}
Path("merge.yml").write_text(json.dumps(told))
ran = subprocess.run(
    ["mergekit-yaml", "merge.yml", "merged", "--no-copy-tokenizer", "--no-write-model-card"],
    capture_output=True, text=True,
)
assert ran.returncode == 0, ran.stderr
merged = Qwen3MoeForCausalLM.from_pretrained("merged").state_dict()
changed = {name: merged[name] != base[name] for name in base}
print(f"q_proj, a density of {density}: kept {changed['model.layers.0.self_attn.q_proj.weight'].float().mean():.3f}")
for name in ("gate_up_proj", "down_proj"):
    experts = changed[f"model.layers.0.mlp.experts.{name}"].float().mean((1, 2)).tolist()
    print(f"experts.{name}, changed in sizes {sizes}: kept", [round(share, 3) for share in experts])
    assert min(experts[:2]) > 0.7 and experts[2] < 0.05 and experts[3] == 0
    assert abs(sum(experts) / 4 - density) < 0.01, "the density holds for all of them together"
print("seen: the density is that of all experts together, and the expert that changed least keeps none of its changes")
PYTHON
