#!/usr/bin/env bash
# mergekit 0.1.5's nuslerp can turn vectors of a matrix one by one (nuslerp_flatten: false). Its guide says that they are the
# columns, and with nuslerp_row_wise: true the rows. It is the other way: without it each row of the tensor, which is the
# weight of one neuron, is a vector; with it each column. And for the experts of a layer, which transformers 5 and mergekit
# hold as one tensor, nuslerp_row_wise: true takes the first axis, which counts the experts: a vector is then made of the same
# single weight of all experts. So what an expert becomes depends on the others, which have nothing to do with it. Nothing
# is said. (Qwen3-MoE; transformers 5.23.0.)
# Follows: row by row, as it is usually meant, is what one gets without the option. Never set it for Mixture-of-Experts.
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
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

print({name: version(name) for name in ("mergekit", "transformers", "torch")})
transformers.utils.logging.disable_progress_bar()
config = Qwen3MoeConfig(
    vocab_size=32, hidden_size=24, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
)
torch.manual_seed(0)
one, two = Qwen3MoeForCausalLM(config), Qwen3MoeForCausalLM(config)
one.save_pretrained("one")


def part(model, name):
    layer = model.model.layers[0]
    return (layer.self_attn.q_proj.weight if name == "attention" else layer.mlp.experts.down_proj).detach()


def merged(row_wise):
    told = {
        "merge_method": "nuslerp", "dtype": "float32",
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": row_wise},
        "models": [{"model": name, "parameters": {"weight": 0.5}} for name in ("one", "two")],
    }
    Path("merge.yml").write_text(json.dumps(told))
    ran = subprocess.run(
        ["mergekit-yaml", "merge.yml", "merged", "--no-copy-tokenizer", "--no-write-model-card"],
        capture_output=True, text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return Qwen3MoeForCausalLM.from_pretrained("merged")


def halfway(a, b, axis):
    """SLERP at one half, of vectors along an axis."""
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=axis).unsqueeze(axis)
    angle = cosine.acos()
    return (a + b) * (angle / 2).sin() / angle.sin()


results, experts = {}, {}
for row_wise in (False, True):
    two.save_pretrained("two")
    model = merged(row_wise)
    a, b = part(one, "attention"), part(two, "attention")
    errors = {told: float((part(model, "attention") - halfway(a, b, axis)).abs().max()) for told, axis in (("rows", 1), ("columns", 0))}
    results[row_wise] = min(errors, key=errors.get)
    assert errors[results[row_wise]] < 1e-6
    print(f"nuslerp_row_wise: {row_wise}: a matrix is merged by its {results[row_wise]}")
    first = part(model, "experts")[0].clone()
    kept = two.state_dict()
    changed = Qwen3MoeForCausalLM(config)
    changed.load_state_dict(kept)
    with torch.no_grad():
        changed.model.layers[0].mlp.experts.down_proj[1:] *= -3.0  # other experts alone
    changed.save_pretrained("two")
    again = part(merged(row_wise), "experts")[0]
    experts[row_wise] = float((again - first).norm() / first.norm())
    print(f"nuslerp_row_wise: {row_wise}: expert 0 changes by {experts[row_wise]:.3f} of itself as the other experts change")
assert results == {False: "rows", True: "columns"}
assert experts[False] < 1e-6 and experts[True] > 0.05
print("seen: rows and columns are exchanged, and experts are mixed")
PYTHON
