#!/usr/bin/env bash
# mergekit 0.1.5's model_stock takes the cosine between the changes of two fine-tuned models, and bounds the product of
# their norms from below by 1e-6, so as not to divide by zero. Changes with norms below 0.001 come under that bound, as
# norms and biases have them, and any small tensor after a short run at a rate of 1e-6: their cosine comes out too small
# by the square of what lacks, and the merge keeps next to nothing of them. Two models with the same change, whose cosine
# is 1, should give that change whole. With a norm of 0.0003 the cosine is read as 0.09 and 0.165 of the change is kept;
# with 0.0001, 0.02. Nothing is said. (fp32 weights; transformers 5.23.0.)
# Follows: of gentle fine-tunings model_stock keeps the large matrices and loses the small tensors. Scale the changes up
# before such a merge and down after it, or use method linear.
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
with torch.no_grad():
    model.model.norm.weight.fill_(2**-6)  # small weights, so that small changes are exact enough in fp32
model.save_pretrained("base")
base = model.model.norm.weight.detach().clone()
direction = torch.nn.functional.normalize(torch.randn(64), dim=0)
found = {}
for norm in (1e-2, 3e-3, 3e-4, 1e-4):
    with torch.no_grad():
        model.model.norm.weight.copy_(base + norm * direction)
    for name in ("one", "two"):
        model.save_pretrained(name)
    told = {
        "merge_method": "model_stock", "base_model": "base", "dtype": "float32",
        "models": [{"model": "one"}, {"model": "two"}],
    }
    Path("merge.yml").write_text(json.dumps(told))
    ran = subprocess.run(
        ["mergekit-yaml", "merge.yml", "merged", "--no-copy-tokenizer", "--no-write-model-card"],
        capture_output=True, text=True,
    )
    assert ran.returncode == 0, ran.stderr
    merged = Qwen3ForCausalLM.from_pretrained("merged").model.norm.weight.detach()
    found[norm] = float(((merged - base) @ direction) / norm)
    cosine = norm**2 / max(norm**2, 1e-6)
    print(
        f"both models changed by the same vector of norm {norm:g}: kept {found[norm]:.4f} of it, should be 1; with the "
        f"bound the cosine is {cosine:.3g}, and 2c/(1+c) = {2 * cosine / (1 + cosine):.4f}"
    )
    assert abs(found[norm] - 2 * cosine / (1 + cosine)) < 2e-3
assert found[1e-2] > 0.999 and found[3e-3] > 0.999
assert 0.15 < found[3e-4] < 0.18 and found[1e-4] < 0.03
print("seen: a change that both models share is lost, if its norm is below a thousandth")
PYTHON
