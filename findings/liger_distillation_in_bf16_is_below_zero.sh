#!/usr/bin/env bash
# liger-kernel 0.8.5's LigerFusedLinearJSDLoss takes the cross-entropy in fp32 and the divergence in the dtype of the
# model: its log-probabilities are rounded to bf16, where numbers near 10 are 0.06 apart, and then subtracted. The
# divergence between two models that are near to each other is smaller than that. What is reported is -0.005 in place of
# 0.0001, and a divergence cannot be below zero; the gradient's direction has a cosine of 0.78 and 0.85 with the right
# one. Of models that are far from each other it is right. No message tells. (The same bf16 states and weights, computed
# in fp32, are what is compared with.)
# Follows: with a teacher that the student comes near, as in self-distillation, the last part of the training follows
# rounding. Hand the loss states and weights in fp32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 triton==3.7.1 liger-kernel==0.8.5
cd "$folder"
CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

print({name: version(name) for name in ("liger-kernel", "torch")})
torch.manual_seed(0)
words, rows, hidden = 32000, 200, 64
weight, states = torch.randn(words, hidden) * 0.3, torch.randn(rows, hidden)
labels, noise = torch.randint(0, words, (rows,)), torch.randn(rows, hidden)
found = {}
for beta in (0.0, 0.5):
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    for distance in (0.01, 0.03, 0.3):
        pair = {}
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher, head = (
                value.bfloat16().to(dtype) for value in (states, states + distance * noise, weight)
            )
            student.requires_grad_()
            value = loss(student, head, teacher, head, labels, None, None)
            value.backward()
            pair[dtype] = float(value.detach()), student.grad.float().flatten()
        (true, right), (told, wrong) = pair[torch.float32], pair[torch.bfloat16]
        cosine = float(torch.nn.functional.cosine_similarity(right, wrong, 0))
        found[beta, distance] = true, told, cosine
        print(f"beta {beta}: divergence in fp32 {true:.6f}, in bf16 {told:.6f}; cosine of the gradients {cosine:.3f}")
assert all(true > 0 for true, _, _ in found.values())
assert found[0.5, 0.01][1] < -0.001 and found[0.5, 0.03][1] < -0.001, "a divergence below zero"
assert found[0.0, 0.01][2] < 0.9 and found[0.5, 0.01][2] < 0.95
assert all(abs(told / true - 1) < 0.2 and cosine > 0.99 for (_, far), (true, told, cosine) in found.items() if far == 0.3)
print("seen: in bf16 the divergence of models that are near to each other is below zero")
PYTHON
