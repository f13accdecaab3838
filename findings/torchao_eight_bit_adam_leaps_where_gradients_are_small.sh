#!/usr/bin/env bash
# torchao 0.18.0's AdamW8bit and AdamWFp8 store both averages of a block of 256 weights with one scale, that of the largest.
# The average of squares has twice as many orders of magnitude as the gradient, so it is rounded to zero first: in 8 bits
# for weights whose gradient is 3,000 times smaller than the largest of the block, in fp8 for 1,000 times. Their average of
# gradients is still stored well. Each step then divides it by the root of (1 - beta2) times this one gradient's square, as
# if there were no past: by 0.03 times the gradient, and by much less where the gradient happens to be near zero. Steps
# are 20 learning rates on average, where Adam's are 0.2, and weights go a hundred times as far. Smaller gradients make it
# no smaller. Tensors with less than 4,096 weights are not quantised. Nothing is raised or logged. (torch.compile, which
# needs a compiler, is switched off here; the arithmetic is the same.)
# Follows: input channels beside one with huge activations, as language models have, are what moves furthest. Keep the
# averages of such tensors in fp32, with an optimizer of their own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 torchao==0.18.0 numpy==2.4.6
cd "$folder"
CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from torchao.optim import AdamW8bit, AdamWFp8

print({name: version(name) for name in ("torchao", "torch")})
torch.compiler.set_stance("force_eager")
ratios, steps, rate = [1.0, 1e-1, 1e-2, 1e-3, 3e-4, 1e-4], 1000, 1e-3


def trained(make):
    """The mean step in the last 100 steps and the furthest way in all, in learning rates, by size of the gradient."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(16, 256))
    optimizer = make([weight], lr=rate, weight_decay=0)
    sizes = torch.ones(16, 256)
    sizes[: len(ratios), 1:] = torch.tensor(ratios)[:, None]  # the first weight of each block has gradients around 1
    moved = []
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = sizes * torch.randn(16, 256)
        optimizer.step()
        moved.append((weight.detach() - before).abs()[: len(ratios), 1:].mean(1) / rate)
    return torch.stack(moved[-100:]).mean(0).tolist(), (weight.detach().abs()[: len(ratios), 1:].amax(1) / rate).tolist()


found = {}
for name, make in (
    ("torch AdamW", torch.optim.AdamW), ("torchao AdamW8bit", AdamW8bit), ("torchao AdamWFp8", AdamWFp8),
):
    found[name] = trained(make)
    told = ", ".join(f"{ratio:g}: {step:.2f} and {way:.0f}" for ratio, step, way in zip(ratios, *found[name], strict=True))
    print(f"{name}, mean step and furthest way in learning rates, by size of the gradient: {told}")
normal, eight, fp8 = (found[name] for name in found)
assert all(0.15 < step < 0.25 for step in normal[0]) and max(normal[1]) < 150
assert all(step < 0.3 for step in eight[0][:3] + fp8[0][:3])
assert all(step > 5 for step in eight[0][4:] + fp8[0][3:]) and all(way > 3000 for way in eight[1][4:] + fp8[1][3:])
print("seen: the smallest gradients of a block have the largest steps")
PYTHON
