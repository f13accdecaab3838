#!/usr/bin/env bash
# bitsandbytes 0.50.2 stores numbers in 8 bits as the nearest of 256 levels, times the largest of their block. One of the
# levels is zero. On a CPU its quantize_blockwise never gives it: zero comes back as 0.00002 times the largest of the
# block (signed levels), and everything that is smaller than that does too, with its sign: the levels around zero are not
# used, in fp32, bf16 and fp16. (Seen with the wheel for x86-64.)
# Its 8-bit optimizers keep their averages so. A weight that has no gradient at all, but shares a block of 256 with one that
# has, gets an average that is not zero and moves: with Lion8bit, which takes the sign, as fast as the weight that is
# trained, with AdamW8bit and AdEMAMix8bit slowly, always the same way. Nothing is raised.
# Follows: masked rows, tokens that do not occur and pruned weights do not keep their values on a CPU. Use the 32-bit
# optimizers there, or set such weights back after each step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
cd "$folder"
CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import bitsandbytes
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise

print({name: version(name) for name in ("bitsandbytes", "torch")})
for signed in (True, False):
    levels = create_dynamic_map(signed=signed)
    assert (levels == 0).any()
    given = torch.zeros(256)
    given[:7] = torch.tensor([1.0, 0.1, 1e-3, 1e-4, 1e-5, 1e-6, 0.0])
    nearest = levels[(given[:, None] - levels).abs().argmin(1)]
    assert nearest[6] == 0 and 0 < nearest[5] < 1e-6
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        codes, state = quantize_blockwise(given.to(dtype), code=levels.clone(), blocksize=256)
        read = levels[codes.long()] * state.absmax[0].float()
        told = ", ".join(f"{number:g} as {back:.3g}" for number, back in zip(given[:7].tolist(), read[:7].tolist(), strict=True))
        print(f"{'signed' if signed else 'unsigned'} levels, {dtype}: {told}")
        assert 1e-5 < float(read[6]) < 3e-5 and (read[7:] == read[6]).all() and read[4] == read[5] == read[6]
    assert float(dequantize_blockwise(*quantize_blockwise(given, code=levels.clone(), blocksize=256))[6]) > 1e-5
rate, found = 1e-3, {}
for name in ("Lion8bit", "AdEMAMix8bit", "AdamW8bit", "Lion32bit", "AdamW32bit"):
    weight = torch.nn.Parameter(torch.zeros(16, 256))
    optimizer = getattr(bitsandbytes.optim, name)([weight], lr=rate, weight_decay=0)
    for _ in range(500):
        weight.grad = torch.zeros(16, 256)
        weight.grad[:, 0] = 1.0
        optimizer.step()
    found[name] = tuple(float(part.abs().max()) / rate for part in (weight.detach()[:, 0], weight.detach()[:, 1:]))
    print(f"{name}, 500 steps: weights with a gradient moved by {found[name][0]:.0f} learning rates, those without by {found[name][1]:.2f}")
assert found["Lion8bit"][1] > 490 and found["AdEMAMix8bit"][1] > 1 and found["AdamW8bit"][1] > 1
assert found["Lion32bit"][1] == found["AdamW32bit"][1] == 0
print("seen: zero is not zero, and weights without gradients move")
PYTHON
