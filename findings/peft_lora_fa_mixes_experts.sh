#!/usr/bin/env bash
# peft 0.21.2: LoRA-FA (create_lorafa_optimizer) trains B alone and multiplies its gradient by the inverse of A·Aᵀ. On an
# expert stack (target_parameters) A and B hold all experts, A's rows expert by expert and B's columns rank by rank. The
# optimizer takes them for one linear: it inverts one matrix over the ranks of all experts, and multiplies the column of
# one expert by the row of another. What comes out has little to do with the step that LoRA-FA means, which is taken
# expert by expert. Nothing is raised, and the loss still falls. The inverse takes experts³ times the work, too: with 128
# experts of rank 16 it is one of 2,048 × 2,048 for each stack and step. (transformers 5.23.0.)
# Follows: LoRA-FA on experts is another optimizer than its name says; take AdamW with A frozen.
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
from peft.optimizers import create_lorafa_optimizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

print({name: version(name) for name in ("peft", "transformers", "torch")})
torch.manual_seed(0)
experts, rank, alpha = 4, 8, 16
model = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
        vocab_size=32, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, num_experts=experts, num_experts_per_tok=2,
    )
)
stacks = ["experts.gate_up_proj", "experts.down_proj"]
model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["o_proj"], target_parameters=stacks))
optimizer = create_lorafa_optimizer(model, r=rank, lora_alpha=alpha, lr=1e-3)
tokens = torch.randint(0, 32, (8, 32))
model(input_ids=tokens, labels=tokens).loss.backward()
factors = {name: value for name, value in model.named_parameters() if ".lora_B." in name}
gradients = {name: value.grad.clone() for name, value in factors.items()}
optimizer.step()
likeness = {}
for name, gradient in gradients.items():
    A = model.get_parameter(name.replace(".lora_B.", ".lora_A.")).detach()
    count = experts if "experts" in name else 1
    A_ERI = A.reshape(count, rank, -1)
    G_EOR = gradient.reshape(len(gradient), rank, count).permute(2, 0, 1)
    wanted = (G_EOR @ torch.linalg.inv(A_ERI @ A_ERI.transpose(1, 2))).permute(1, 2, 0).reshape(gradient.shape)
    # The first moment after one step is a tenth of the gradient that Adam was given.
    taken = optimizer.state[name.split("lora_B")[0] + "lora"]["exp_avg_B"]
    likeness[name] = float(torch.nn.functional.cosine_similarity(taken.flatten(), wanted.flatten(), dim=0))
    print(f"{name.split('.layers.0.')[1].split('.lora_B')[0]}: cosine of the step taken and LoRA-FA's own {likeness[name]:.3f}")
assert all(value < 0.9 if "experts" in name else value > 0.99 for name, value in likeness.items())
print("seen: on expert stacks LoRA-FA multiplies one expert's gradient by another's factors")
PYTHON
