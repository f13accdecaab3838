#!/usr/bin/env bash
# peft 0.21.2: two of its optimizers multiply gradients by an inverse of factors. LoRA-FA (create_lorafa_optimizer) trains B
# alone, by the inverse of A·Aᵀ; create_riemannian_optimizer does so for B, and for A by that of Bᵀ·B. On an expert stack
# (target_parameters) A and B hold all experts, A's rows expert by expert and B's columns rank by rank. Both optimizers take
# them for one linear: they invert one matrix over the ranks of all experts, and multiply the column of one expert by the
# row of another. What comes out has little to do with the step that is meant, which is taken expert by expert. Nothing is
# raised, and the loss still falls. The inverse takes experts³ times the work of one: with 128 experts of rank 16 it is of
# 2,048 × 2,048, for each stack and step, where r × r is documented. (transformers 5.23.0.)
# Follows: on experts they are other optimizers than their names say. Take AdamW, with A frozen if it is that.
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
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

print({name: version(name) for name in ("peft", "transformers", "torch")})
experts, rank, alpha = 4, 8, 16
tokens = torch.randint(0, 32, (8, 32), generator=torch.Generator().manual_seed(0))
stacks = ["experts.gate_up_proj", "experts.down_proj"]


def adapted():
    """A model with gradients on all factors, none of which is zero."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=32, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, num_experts=experts, num_experts_per_tok=2,
        )
    )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["o_proj"], target_parameters=stacks)
    model = get_peft_model(model, config)
    for name, value in model.named_parameters():
        if ".lora_" in name:
            value.data.normal_(std=0.3)
    return model


def single(A, B):
    """A [E, R, I] and B [E, O, R] of each expert; of a linear, as of one."""
    count = len(A) // rank
    return A.reshape(count, rank, -1), B.reshape(len(B), rank, count).permute(2, 0, 1)


def stacked(A, B):
    return A.reshape(-1, A.shape[2]), B.permute(1, 2, 0).reshape(B.shape[1], -1)


def compare(what, pairs, damping):
    """`pairs` by layer: A and B, their gradients, and what the optimizer made of the gradients (None: not trained)."""
    for name, (A, B, grad_A, grad_B, taken_A, taken_B) in pairs.items():
        A_ERI, B_EOR = single(A, B)
        GA_ERI, GB_EOR = single(grad_A, grad_B)
        wanted = stacked(
            torch.linalg.inv(B_EOR.transpose(1, 2) @ B_EOR + damping * torch.eye(rank)) @ GA_ERI,
            GB_EOR @ torch.linalg.inv(A_ERI @ A_ERI.transpose(1, 2) + damping * torch.eye(rank)),
        )
        for side, taken, meant in zip("AB", (taken_A, taken_B), wanted):
            if taken is None:
                continue
            like = float(torch.nn.functional.cosine_similarity(taken.flatten(), meant.flatten(), dim=0))
            print(f"{what}, {name}, {side}: cosine of the step taken and the step meant {like:.3f}")
            assert like < 0.9 if "experts" in name else like > 0.99


def factors(model):
    found = dict(model.named_parameters())
    for name in found:
        if ".lora_A." in name:
            yield name.split(".layers.0.")[1].split(".lora_A")[0], found[name], found[name.replace("lora_A", "lora_B")]


model = adapted()
model(input_ids=tokens, labels=tokens).loss.backward()
before = {name: [one.clone() for one in (A.detach(), B.detach(), A.grad, B.grad)] for name, A, B in factors(model)}
optimizer = create_lorafa_optimizer(model, r=rank, lora_alpha=alpha, lr=1e-3)
optimizer.step()
moments = {name.split(".layers.0.")[1].removesuffix(".lora"): state["exp_avg_B"] for name, state in optimizer.state.items()}
compare("LoRA-FA", {name: (*values, None, moments[name]) for name, values in before.items()}, 1e-8)

model = adapted()
optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=1e-2)
model(input_ids=tokens, labels=tokens).loss.backward()
before = {name: [one.clone() for one in (A.detach(), B.detach(), A.grad, B.grad)] for name, A, B in factors(model)}
optimizer.step()
taken = {name: (before[name][0] - A.detach(), before[name][1] - B.detach()) for name, A, B in factors(model)}
compare("Riemannian", {name: (*values, *taken[name]) for name, values in before.items()}, 1e-2)
print("seen: on expert stacks one expert's gradient is multiplied by another's factors")
PYTHON
