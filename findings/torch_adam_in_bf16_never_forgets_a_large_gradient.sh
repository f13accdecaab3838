#!/usr/bin/env bash
# torch 2.13's AdamW keeps its averages in the parameters' dtype. Its average of squares falls by a thousandth a step
# (betas=(0.9, 0.999), the defaults). A number in bf16 has 8 bits: a thousandth of it is less than half of its last one,
# so v - v/1000 rounds to v, and the average does not fall at all. One large gradient, as on a first batch, is remembered
# for ever, and each later step is divided by it. Nor does the average rise to where it belongs: of a gradient that is
# always 1 it stays at half, for 1/1000 of what lacks is too little to add. All three implementations (a loop, foreach,
# fused) do so, fused too, which computes in fp32 but stores in bf16. Nothing is raised; the loss falls, slowly.
# Follows: a model loaded in bf16 and trained whole takes steps that are many times too small after a spike, in all of
# the run. Keep parameters (or the optimizer's state) in fp32, or set beta2 to 0.95, whose steps bf16 can hold.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

print({"torch": torch.__version__})
steps = 3000


def trained(dtype, gradients, beta2=0.999, **implementation):
    """The average of squares and the parameter after all gradients."""
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0, betas=(0.9, beta2), **implementation)
    for gradient in gradients:
        parameter.grad = torch.full((4,), gradient, dtype=dtype)
        optimizer.step()
    return float(optimizer.state[parameter]["exp_avg_sq"][0]), float(parameter[0])


spike = [1.0] + [1e-3] * steps
told = 1e-3 * 0.999**steps + 1e-6 * (1 - 0.999**steps)
print(f"one gradient of 1, then {steps} of 0.001: the average of squares should be {told:.3g}")
for implementation in ({"foreach": False}, {"foreach": True}, {"fused": True}):
    full, moved = trained(torch.float32, spike, **implementation)
    half, crept = trained(torch.bfloat16, spike, **implementation)
    print(f"{implementation}: fp32 {full:.3g} (moved {moved:.3f}), bf16 {half:.3g} (moved {crept:.3f})")
    assert abs(full / told - 1) < 0.01 and half > 0.00099 and abs(crept) < abs(moved) / 5
full, half = (trained(dtype, [1.0] * steps)[0] for dtype in (torch.float32, torch.bfloat16))
print(f"{steps} gradients of 1: it should be {1 - 0.999**steps:.3f}; fp32 {full:.3f}, bf16 {half:.3f}")
assert abs(full - (1 - 0.999**steps)) < 1e-3 and half == 0.5
better = trained(torch.bfloat16, spike, beta2=0.95)[0]
print(f"beta2=0.95 in bf16, after the spike: {better:.3g}")
assert better < 1e-5
print("seen: in bf16 the average of squares keeps the large gradient to the end")
PYTHON
