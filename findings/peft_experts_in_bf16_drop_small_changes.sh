#!/usr/bin/env bash
# peft 0.21.2 applies LoRA on a stack of experts (target_parameters) by adding scaling·B·A to the weight at every forward,
# in the weight's dtype. In bf16 a weight keeps 8 bits, and a change below half of its last one is rounded away: the sum is
# the old weight. LoRA on a linear, which adds to the result instead, loses nothing. So the experts' adapter exists in
# its file and in the optimizer, and reaches the model late or never: at a rate of 1e-6, TRL's default for GRPO, next to
# nothing of it after 20 steps, while attention beside it is trained in full. Gradients flow and norms grow as usual.
# (transformers 5.23.0; a model loaded in bf16, whose adapter PEFT keeps in fp32.)
# Follows: where rates are small, do not judge by the adapter's norm. Compare the outputs with and without it, or keep the
# experts in fp32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

print({name: version(name) for name in ("peft", "transformers", "torch")})
experts, hidden, width, rank = 4, 1024, 256, 16
config = Qwen3MoeConfig(
    vocab_size=64, hidden_size=hidden, moe_intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=64, num_experts=experts, num_experts_per_tok=2,
)


def reached(rate: float, dtype: torch.dtype) -> float:
    """After 20 steps: how much of scaling·B·A of the first projections is in the weight that the forward multiplies by."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(dtype)  # weights of about 0.02, as models have them
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules=[], target_parameters=stacks))
    wrapper = model.base_model.model.model.layers[0].mlp.experts.base_layer
    stack, used = wrapper.get_base_layer(), {}
    before = stack.gate_up_proj.detach().clone()
    stack.register_forward_pre_hook(lambda module, _: used.update(weight=module.gate_up_proj.detach().clone()))
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=rate)
    tokens = torch.randint(0, 64, (4, 64))
    for _ in range(20):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    assert A.dtype == B.dtype == torch.float32
    A, B = A.detach().reshape(experts, rank, -1), B.detach().reshape(-1, rank, experts).permute(2, 0, 1)
    told = 32 / rank * B @ A
    with torch.no_grad():
        model(input_ids=tokens)
    change = used["weight"].float() - before.float()
    return float((change * told).sum() / told.square().sum())


shares = {(rate, dtype): reached(rate, dtype) for dtype in (torch.float32, torch.bfloat16) for rate in (1e-6, 1e-5, 1e-4)}
for (rate, dtype), share in shares.items():
    print(f"{dtype}, rate {rate:.0e}: {share:.0%} of the adapter's change is in the weight that is used")
assert all(share > 0.98 for (_, dtype), share in shares.items() if dtype == torch.float32)
assert shares[1e-6, torch.bfloat16] < 0.25 and shares[1e-4, torch.bfloat16] > 0.9
print("seen: in bf16 a small change of the experts is rounded away at every forward")
PYTHON
