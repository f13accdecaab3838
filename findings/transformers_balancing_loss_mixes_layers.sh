#!/usr/bin/env bash
# transformers 5.23.0's load-balancing loss (Qwen3-MoE, Mixtral, OLMoE, gpt-oss and other families) adds up the
# tokens of each expert over all layers before it asks whether they are even. Expert 3 of one layer and expert 3 of the
# next are counted as one, though they have nothing in common. A model whose every layer sends all tokens to the same two
# experts, another two in each layer, has the lowest loss there is, as one whose experts are all used, and no gradient that
# would pull it away from there; six of eight experts are idle in every layer. Taken layer by layer the loss is four times
# as large.
# Follows: a low `aux_loss` in a log says nothing of the layers. Count the tokens of each expert in each layer, or take the
# mean of the loss over layers yourself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib import import_module
from importlib.metadata import version

import torch

print({name: version(name) for name in ("transformers", "torch")})
layers, experts, top_k, tokens = 4, 8, 2, 800


def router_logits(favourites):
    """Of each layer [tokens, experts]: `favourites(layer, token)` are the two experts that the token goes to."""
    made = torch.zeros(layers, tokens, experts)
    for layer in range(layers):
        for token in range(tokens):
            for expert in favourites(layer, token):
                made[layer, token, expert % experts] = 5.0
    return tuple(made.requires_grad_().unbind())


MODELS = {
    "all experts in use": lambda layer, token: (2 * token, 2 * token + 1),
    "two in each layer, others in each": lambda layer, token: (2 * layer, 2 * layer + 1),
    "the same two in every layer": lambda layer, token: (0, 1),
}
for family in ("qwen3_moe", "mixtral", "gpt_oss"):
    loss_of = import_module(f"transformers.models.{family}.modeling_{family}").load_balancing_loss_func
    found = {}
    for what, favourites in MODELS.items():
        logits = router_logits(favourites)
        loss = loss_of(logits, experts, top_k)
        pull = max(float(gradient.abs().max()) for gradient in torch.autograd.grad(loss, logits))
        single = sum(float(loss_of((one,), experts, top_k)) for one in logits) / layers
        idle = sum(int((one.topk(top_k).indices.flatten().bincount(minlength=experts) == 0).sum()) for one in logits)
        found[what] = float(loss), pull, single, idle
        print(f"{family}, {what}: loss {loss:.2f}, largest gradient {pull:.0e}; idle experts in a layer: {idle // layers};",
              f"mean of the layers' own losses {single:.2f}")
    even, hidden, plain = (found[what] for what in MODELS)
    assert abs(even[0] - hidden[0]) < 1e-3 and hidden[3] == layers * 6 and even[3] == 0
    assert hidden[2] > 3.9 * even[2] and plain[0] > 3.9 * even[0] and plain[1] > 1e3 * hidden[1]
print("seen: the loss does not see that layers use few of their experts, if they use different ones")
PYTHON
