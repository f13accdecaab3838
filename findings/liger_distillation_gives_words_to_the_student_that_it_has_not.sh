#!/usr/bin/env bash
# liger-kernel 0.8.5's distillation losses (LigerFusedLinearJSDLoss and its kin) take a teacher whose vocabulary is longer
# than the student's, padded for speed as Qwen's larger models are, and then pad the student's logits with zeros. A logit
# of zero is not "no such word": it has the weight exp(0), as much as any word of logit zero. So the student's
# probabilities are diluted by words that it has not, and how much depends on how high its logits happen to be, to which
# a softmax is blind. A student that equals its teacher has a loss and a gradient; with logits ten lower, which are the
# same model, a loss of 3.4 in place of 0.002. With padding of -inf it would be 0 each time. No message tells.
# Follows: a part of the training goes into lifting all logits above zero. Cut the teacher's head to the student's rows.
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
hidden, words, padding, rows = 32, 1000, 64, 50
weight, states = torch.randn(words, hidden) * 0.5, torch.randn(rows, hidden)
longer = torch.cat([weight, torch.zeros(padding, hidden)])
labels = torch.randint(0, words, (rows,))
loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
found = {}
for padded in (True, False):
    for shift in (0.0, -5.0, -10.0, -20.0):
        student = states.clone().requires_grad_()
        bias = torch.full((words,), shift)
        teacher = (longer, torch.cat([bias, torch.full((padding,), shift - 30.0)])) if padded else (weight, bias)
        value = loss(student, weight, states, teacher[0], labels, bias, teacher[1])
        value.backward()
        found[padded, shift] = float(value.detach()), float(student.grad.norm())
        print(
            f"the teacher has {words + padding * padded} words, the student {words}; all logits moved by {shift:g}: "
            f"loss {found[padded, shift][0]:.6f}, norm of the gradient {found[padded, shift][1]:.6f}"
        )
logits = states @ weight.t() - 10
mass = padding / (padding + logits.exp().sum(-1))
print(f"moved by -10, the {padding} words that are not there have {mass.mean():.3f} of the student's probability;")
print(f"-log of what is left to the others, on average: {-torch.log1p(-mass).mean():.4f}")
assert all(abs(value) < 1e-4 for (padded, _), pair in found.items() if not padded for value in pair)
assert abs(found[True, -10.0][0] - float(-torch.log1p(-mass).mean())) < 1e-2
assert found[True, 0.0][0] > 1e-3 and found[True, -10.0][0] > 3 and found[True, -20.0][0] > 10
print("seen: a student that equals its teacher has a loss, which grows as all logits are moved down together")
PYTHON
