#!/usr/bin/env bash
# Mixed precision (weights in fp32, torch.autocast in bf16: Trainer's bf16=True) does not reach the experts of a MoE in
# transformers 5.23.0 with torch 2.13. Their default implementation is a grouped product, which autocast does not know,
# and transformers casts its rows to the weights' dtype. So what is most of the arithmetic of a MoE stays in fp32, with
# fp32 activations saved for the backward; attention and head go in bf16. The older implementations ("eager", "batched_mm")
# are cast as one expects. No message tells, and the numbers are better rather than worse.
# Follows: such a run is slower and larger than it should be. Load the model in bf16, or set
# experts_implementation="eager", and compare.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from collections import Counter
from importlib.metadata import version

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

print({name: version(name) for name in ("transformers", "torch")})


class Products(TorchDispatchMode):
    """Multiplications in matrix products, by the dtype that they are computed in."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten._grouped_mm):
            assert args[0].dtype == args[1].dtype
            # Each row meets one weight: of its group, if there are groups.
            self.counted[args[0].dtype] += args[0].numel() * output.shape[-1]
        return output


found = {}
for experts in (None, "eager", "batched_mm"):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=4,
    )
    model = Qwen3MoeForCausalLM(config)
    if experts:
        model.set_experts_implementation(experts)
    tokens = torch.randint(0, 64, (4, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16), Products() as products:
        model(input_ids=tokens, labels=tokens)
    name = model.config._experts_implementation
    found[name] = products.counted[torch.float32] / products.counted.total()
    print(f"{name}{'' if experts else ' (the default)'}: {found[name]:.0%} of the multiplications of a forward are in fp32")
assert found["grouped_mm"] > 0.6 and found["eager"] == found["batched_mm"] == 0
print("seen: autocast leaves the experts in fp32")
PYTHON
