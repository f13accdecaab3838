#!/usr/bin/env bash
# mergekit 0.1.5's multislerp is to interpolate on a sphere between any number of models: it takes the mean of the
# directions, projects all directions onto the plane that touches the sphere there, mixes them in that plane by their
# weights, and goes back. But the weighted sum of these projections is zero, whatever the weights are: that is what makes
# the point the mean. So the second half does nothing, and the result is the mean of the directions, stretched. For equal
# weights of two models that is the same as SLERP. For others it is not: with weights 0.9 and 0.1 and matrices at right
# angles the way is 6.3 degrees and not 9, and with three models it is not their mean on the sphere either. Nothing is said.
# Follows: weights act otherwise than in slerp and nuslerp: a model with a small one counts for less than it was given. Use
# nuslerp for two models, or karcher for the true mean of many.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 mergekit==0.1.5
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import json
import math
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
directions = torch.linalg.qr(torch.randn(weight.numel(), 3)).Q.T.reshape(3, *weight.shape)  # at right angles
for name, direction in zip(("one", "two", "three"), directions, strict=True):
    with torch.no_grad():
        weight.copy_(direction)
    model.save_pretrained(name)


def merged(method, weights):
    """The merged weight, in parts of the three directions."""
    models = [{"model": name, "parameters": {"weight": share}} for name, share in weights.items()]
    told = {"merge_method": method, "dtype": "float32", "models": models}
    Path("merge.yml").write_text(json.dumps(told))
    ran = subprocess.run(
        ["mergekit-yaml", "merge.yml", "merged", "--no-copy-tokenizer", "--no-write-model-card"],
        capture_output=True, text=True,
    )
    assert ran.returncode == 0, ran.stderr
    mixed = Qwen3ForCausalLM.from_pretrained("merged").model.layers[0].mlp.up_proj.weight.detach()
    return [float((mixed * direction).sum()) for direction in directions]


for share in (0.5, 0.3, 0.1, 0.02):
    angles = {}
    for method in ("multislerp", "nuslerp"):
        parts = merged(method, {"one": 1 - share, "two": share})
        angles[method] = math.degrees(math.atan2(parts[1], parts[0]))
    told = math.degrees(math.atan2(share, 1 - share))
    print(
        f"weights {1 - share:g} and {share:g}, matrices at 90 degrees: multislerp goes {angles['multislerp']:.2f} degrees, "
        f"nuslerp {angles['nuslerp']:.2f}, the mean of the directions {told:.2f}"
    )
    assert abs(angles["multislerp"] - told) < 0.02 and abs(angles["nuslerp"] - 90 * share) < 0.02
parts = merged("multislerp", {"one": 0.8, "two": 0.1, "three": 0.1})
norm = math.hypot(*parts)
unit = [part / norm for part in parts]
# On a sphere the mean is where the weighted pulls along the great circles cancel; `pull` is what is left of them.
pull = [
    sum(w * math.acos(unit[i]) / math.sqrt(1 - unit[i] ** 2) * ((i == j) - unit[i] * unit[j]) for i, w in enumerate(shares))
    for shares in [(0.8, 0.1, 0.1)]
    for j in range(3)
]
left = math.degrees(math.hypot(*pull))
print(f"three models, weights 0.8, 0.1, 0.1: {[round(part, 3) for part in unit]}; a mean on the sphere would be {left:.1f} degrees on")
assert abs(unit[1] / unit[0] - 0.125) < 1e-3 and left > 2
print("seen: multislerp is the mean of the directions")
PYTHON
