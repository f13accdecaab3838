#!/usr/bin/env bash
# SCE weighs each model's change of a tensor by its mean square, so that the model that was trained most counts most.
# mergekit 0.1.5's sce falls back to equal weights where the sum of these mean squares is below 1e-6. A mean square of
# 1e-6 is a change of 0.001 for each weight, a twentieth of a usual weight of 0.02: nearly no fine-tuning, and no adapter,
# moves weights as far. So the weights that give the method its C ("calculate") are 1/n wherever it is used, and suddenly
# 10 : 1 in a tensor that was changed a little more. Two models whose changes differ tenfold in size, 100 : 1 by SCE,
# are merged 1 : 1. Nothing is said. (Changes by 0.01, which no one has, are weighed rightly. transformers 5.23.0.)
# Follows: a merge by sce is a plain mean of changes with signs elected. Give weights yourself, by another method, or
# scale the changes up before the merge and down after it.
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
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

print({name: version(name) for name in ("mergekit", "transformers", "torch")})
transformers.utils.logging.disable_progress_bar()
config = Qwen3Config(
    vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32,
)
torch.manual_seed(0)
model = Qwen3ForCausalLM(config)
weight = model.model.layers[0].mlp.up_proj.weight
model.save_pretrained("base")
base = weight.detach().clone()
print(f"the weights have a root mean square of {base.square().mean().sqrt():.3f}")
direction = torch.randn_like(base).abs()  # both changes go the same way, so that no sign is voted out
direction /= direction.square().mean().sqrt()
told = {
    "merge_method": "sce", "base_model": "base", "dtype": "float32", "models": [{"model": "one"}, {"model": "two"}],
}
Path("merge.yml").write_text(json.dumps(told))
found = {}
for size in (1e-2, 2e-3, 5e-4, 1e-4):
    for name, share in (("one", 1.0), ("two", 0.1)):
        with torch.no_grad():
            weight.copy_(base + share * size * direction)
        model.save_pretrained(name)
    ran = subprocess.run(
        ["mergekit-yaml", "merge.yml", "merged", "--no-copy-tokenizer", "--no-write-model-card"],
        capture_output=True, text=True,
    )
    assert ran.returncode == 0, ran.stderr
    merged = Qwen3ForCausalLM.from_pretrained("merged").model.layers[0].mlp.up_proj.weight.detach()
    kept = float(((merged - base) * direction).mean() / size)  # w · 1 + (1 - w) · 0.1
    found[size] = (kept - 0.1) / 0.9
    print(
        f"one model changed its weights by {size:g}, the other by {size / 10:g}: their weights in the merge are "
        f"{found[size]:.3f} and {1 - found[size]:.3f}, by SCE {100 / 101:.3f} and {1 / 101:.3f}"
    )
assert all(abs(found[size] - 100 / 101) < 0.01 for size in (1e-2, 2e-3))
assert all(abs(found[size] - 0.5) < 0.01 for size in (5e-4, 1e-4))
print("seen: changes below 0.001 are weighed alike")
PYTHON
