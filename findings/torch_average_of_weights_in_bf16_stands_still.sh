#!/usr/bin/env bash
# torch 2.13's moving average of weights (torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn(0.999)) is kept in
# the weights' dtype, though each update adds a thousandth of the difference. In bf16 a number has 8 bits, so what is
# added is rounded away unless the weight has moved by two to four times its own size: the average stays what it was at the
# first update, for ever. Weights that went from 1 to 1.5 and stayed there for 5,000 updates have an average of 1, not
# 1.497. Nothing is raised, and the averaged model works: it is the untrained one.
# Follows: an evaluation of the average of a bf16 model measures its start. Average a copy in fp32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

print({"torch": torch.__version__})
updates, decay = 5000, 0.999
told = 1.5 - 0.5 * decay**updates
found = {}
for dtype in (torch.float32, torch.bfloat16):
    model = torch.nn.Linear(2, 2, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.fill_(1.0)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        averaged.update_parameters(model)
        model.weight.fill_(1.5)
        for _ in range(updates):
            averaged.update_parameters(model)
    found[dtype] = float(averaged.module.weight[0, 0])
    print(f"{dtype}: weights 1 -> 1.5, the average after {updates} updates {found[dtype]:.4f}, should be {told:.4f}")
assert abs(found[torch.float32] - told) < 1e-3
assert found[torch.bfloat16] == 1.0
print("seen: in bf16 the average is still the first weight")
PYTHON
