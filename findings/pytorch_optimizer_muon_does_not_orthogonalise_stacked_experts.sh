#!/usr/bin/env bash
# Muon makes the update of each weight matrix orthogonal: all of its singular values become about 1. transformers 5 holds the
# experts of a layer as one tensor of three axes. pytorch-optimizer 4.1.0's Muon (NorMuon too) takes parameters with two
# axes or more, tells to "pass higher dimensional weights directly", and uses "a flattened matrix view", as it says: a row
# for each expert, with all of its weights side by side. So what is made orthogonal are the experts to each other. Within
# an expert the update is its gradient, scaled to a norm of about 1: where all singular values should be 1, the largest is
# a half and the middle one 0.04. Experts learn many times slower than attention at the same rate. As matrices of their
# own, the same experts get what Muon promises. No warning comes. (torch's own Muon refuses three axes.)
# Follows: for most of the weights of a Mixture-of-Experts it is not Muon, but normalised gradient descent with a small
# rate. Give experts to AdamW, or to a Muon that treats each expert as a matrix.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pytorch-optimizer==4.1.0 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from pytorch_optimizer import Muon, NorMuon
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

print({name: version(name) for name in ("pytorch-optimizer", "transformers", "torch")})
torch.manual_seed(0)
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=4, head_dim=16, num_experts=8, num_experts_per_tok=2,
))
tokens = torch.randint(0, 64, (8, 64))
model(input_ids=tokens, labels=tokens).loss.backward()
layer = model.model.layers[0]
stacked, attention = layer.mlp.experts.down_proj, layer.self_attn.q_proj.weight
print("the experts' weight has the shape", tuple(stacked.shape))


def update(make, weights, gradients):
    """The first update of weights by an optimizer, at a rate of 1."""
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    for copy, gradient in zip(copies, gradients, strict=True):
        copy.grad = gradient.clone()
    make([{"params": copies, "lr": 1.0, "use_muon": True, "weight_decay": 0.0}]).step()
    return [copy.detach() - weight.detach() for copy, weight in zip(copies, weights, strict=True)]


for make in (Muon, NorMuon):
    parts = {
        "attention": update(make, [attention], [attention.grad]),
        "experts one by one": update(make, list(stacked), list(stacked.grad)),
        "experts stacked": list(update(make, [stacked], [stacked.grad])[0]),
    }
    values = {told: torch.stack([torch.linalg.svdvals(change) for change in changes]) for told, changes in parts.items()}
    scale = values["experts one by one"].median()
    even = {}
    for told, found in values.items():
        even[told] = float((found[:, 0] / found.median(1).values).median())
        print(
            f"{make.__name__}, {told}: singular values of an update, the largest {float(found[:, 0].median() / scale):.3f}, the "
            f"middle one {float(found.median() / scale):.4f} (of the middle one of experts one by one)"
        )
    assert even["experts one by one"] < 4 < even["experts stacked"] / 2
    assert float(values["experts stacked"].median() / scale) < 0.1
print("seen: stacked experts are not made orthogonal")
PYTHON
