#!/usr/bin/env bash
# TIES keeps, of the changes that models made to a weight, those with the sign of their sum. mergekit 0.1.5 takes a sum of zero
# for positive. Between models that are stored in bf16 it is often zero exactly: a gentle fine-tuning moves a weight by one
# step of bf16 up or down or not at all, and where one model went up and the other down the steps are the same. TIES then
# keeps the upward change alone, each time, and never the downward one. So the merge has a mean change that neither model
# has, upwards in all weights at once, where it should have none; swapping the signs of both models does not swap it. It
# makes no difference in which dtype the merge computes. Models in fp32 have no such ties. Nothing is said. (density 1 and
# no normalisation, to see it alone; the original code takes the sign of the whole tensor there. transformers 5.23.0.)
# Follows: each layer's outputs get a common offset that grows with the sum of its inputs. Merge fp32 checkpoints, or use
# dare_linear or task_arithmetic, which add.
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
    vocab_size=32, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32,
)


def weight(model):
    return model.model.layers[0].mlp.up_proj.weight


def drift(stored, method, sign=1.0):
    """The mean change of a merge as a share of the models' root mean square, of the models themselves, and the ties."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    start = weight(model).detach().to(stored).float().clone()
    changes = []
    for name in ("base", "one", "two"):
        noise = 0 if name == "base" else sign * 1e-4 * torch.randn_like(start)
        with torch.no_grad():
            weight(model).copy_((start + noise).to(stored))
        saved = Qwen3ForCausalLM(config).to(stored)
        saved.load_state_dict(model.state_dict())
        saved.save_pretrained(name)
        changes.append(weight(saved).detach().float() - start)
    told = {
        "merge_method": method, "base_model": "base", "dtype": "float32", "parameters": {"normalize": False},
        "models": [{"model": name, "parameters": {"weight": 1.0}} for name in ("one", "two")],
    }
    Path("merge.yml").write_text(json.dumps(told))
    ran = subprocess.run(
        ["mergekit-yaml", "merge.yml", "merged", "--no-copy-tokenizer", "--no-write-model-card"],
        capture_output=True, text=True,
    )
    assert ran.returncode == 0, ran.stderr
    merged = weight(Qwen3ForCausalLM.from_pretrained("merged", dtype=torch.float32)).detach() - start
    size = changes[1].square().mean().sqrt()
    tied = ((changes[1] + changes[2] == 0) & (changes[1] != 0)).float().mean()
    return float(merged.mean() / size), max(abs(float(change.mean() / size)) for change in changes[1:]), float(tied)


found = {}
for stored in (torch.bfloat16, torch.float32):
    for method in ("ties", "task_arithmetic"):
        for sign in (1.0, -1.0):
            found[stored, method, sign] = drift(stored, method, sign)
            mean, own, tied = found[stored, method, sign]
            print(
                f"{stored}, {method}, changes times {sign:g}: {tied:.1%} of the weights have opposite changes of the same size; the mean "
                f"change is {mean:+.4f} of their root mean square, that of the models at most {own:.4f}"
            )
for stored, method, sign in found:
    mean, own, tied = found[stored, method, sign]
    assert own < 0.01
    if stored is torch.bfloat16 and method == "ties":
        assert mean > 0.04 and tied > 0.05
    else:
        assert abs(mean) < 0.01
print("seen: ties of bf16 models are broken upwards")
PYTHON
