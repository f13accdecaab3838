#!/usr/bin/env bash
# DARE drops each change of a weight at random and divides what it keeps by the density, so that the mean is the change
# as it was. mergekit 0.1.5's dare_linear and dare_ties scale by something else: by the factor that gives the tensor its
# old sum of absolute changes. For large, even matrices that is nearly the same. Where few entries hold much of the sum
# (norms, biases, rows of experts that were trained much more than others) it is another method: a large change that is
# kept is hardly scaled, so that on average half of it is lost, and where it is dropped all small ones grow for it. At a
# density of 0.5 the factor should be 2; one entry of 1 beside 63 of 0.01 makes it about 1.2 or 5. No message tells.
# (transformers 5.23.0.)
# Follows: results with DARE in mergekit are not those of the paper on such tensors, and `rescale: false` plus a weight
# divided by the density is.
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
from transformers import Qwen3Config, Qwen3ForCausalLM

print({name: version(name) for name in ("mergekit", "transformers", "torch")})
config = Qwen3Config(
    vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32,
)
torch.manual_seed(0)
model = Qwen3ForCausalLM(config)
model.save_pretrained("base")
base = {name: value.clone() for name, value in model.state_dict().items()}
change = torch.full((64,), 0.01)
change[0] = 1.0
even = 0.01 * torch.randn(64, 64)
with torch.no_grad():
    model.model.norm.weight += change
    model.model.layers[0].mlp.up_proj.weight += even
model.save_pretrained("tuned")
density, found = 0.5, {}
told = {
    "merge_method": "dare_linear", "base_model": "base", "dtype": "float32",
    "models": [{"model": "tuned", "parameters": {"weight": 1.0, "density": density}}],
}
Path("merge.yml").write_text(json.dumps(told))
for seed in range(6):
    ran = subprocess.run(
        ["mergekit-yaml", "merge.yml", "merged", "--no-copy-tokenizer", "--no-write-model-card", "--random-seed", str(seed)],
        capture_output=True, text=True,
    )
    assert ran.returncode == 0, ran.stderr
    merged = Qwen3ForCausalLM.from_pretrained("merged").state_dict()
    got = merged["model.norm.weight"] - base["model.norm.weight"]
    kept = got.abs() > 1e-4
    factor = float((got[kept] / change[kept]).mean())
    wanted = float(change.sum() / change[kept].sum())
    matrix = merged["model.layers.0.mlp.up_proj.weight"] - base["model.layers.0.mlp.up_proj.weight"]
    wide = float(matrix[matrix.abs() > 1e-6].abs().sum() / even[matrix.abs() > 1e-6].abs().sum())
    found[seed] = bool(kept[0]), factor
    print(
        f"seed {seed}: the large change {'kept' if kept[0] else 'dropped'}, {int(kept.sum())} of 64 kept, multiplied by "
        f"{factor:.3f} (old sum over kept sum {wanted:.3f}; 1/density {1 / density:g}); an even matrix by {wide:.3f}"
    )
    assert abs(factor / wanted - 1) < 0.02 and abs(wide - 2) < 0.2
assert all(factor < 1.5 if large else factor > 3 for large, factor in found.values())
assert {large for large, _ in found.values()} == {True, False}
print("seen: what is kept is not multiplied by 1/density, but by what restores the tensor's sum")
PYTHON
