#!/usr/bin/env bash
# torch 2.13's product of float rows with int8 weights on a CPU (`torch._weight_int8pack_mm`, behind int8 weight-only
# models) takes rows in bf16, fp16 and fp32, and is fast in bf16 alone. In fp16 and fp32 it has no vector code: it takes
# about fifty times as long as in bf16, and ten times as long as converting the whole weight and multiplying, which is
# what it is there to save. Nothing warns; the numbers are right.
# Follows: a model of int8 weights that decodes on a CPU should compute in bf16, or convert its weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import time
from importlib.metadata import version

import torch

print("torch", version("torch"), torch.backends.cpu.get_cpu_capability())
torch.set_num_threads(1)
rows, outputs, inputs = 8, 2048, 2048
weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)


def milliseconds(function):
    function()
    found = []
    for _ in range(5):
        started = time.process_time()
        function()
        found.append(1e3 * (time.process_time() - started))
    return min(found)


packed, converted = {}, {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    x, scale = torch.randn(rows, inputs, dtype=dtype), torch.ones(outputs, dtype=dtype)
    wanted = x.float() @ weight.float().t()
    error = (torch._weight_int8pack_mm(x, weight, scale).float() - wanted).abs().max() / wanted.abs().max()
    assert error < 0.01
    packed[dtype] = milliseconds(lambda: torch._weight_int8pack_mm(x, weight, scale))
    converted[dtype] = milliseconds(lambda: x @ weight.to(dtype).t())
    print(f"{dtype}: {packed[dtype]:.2f} ms, weight converted instead {converted[dtype]:.2f} ms")
for dtype in (torch.float16, torch.float32):
    assert packed[dtype] > 8 * packed[torch.bfloat16], "as fast as in bf16 now"
    assert packed[dtype] > converted[dtype], "faster than converting now"
PYTHON
