#!/usr/bin/env bash
# HQQ 0.2.8.post1 packs eight groups of 1-bit weights into one byte. Where the number of groups is no multiple of eight,
# the last ones are dropped while packing, without a word: HQQLinear is made, says that it is ready and gives a state to
# save, in which the shape and the scales count groups whose weights are nowhere. Only using the layer fails, with a
# word about tensor sizes. (2 and 4 bits refuse such a weight while packing.)
# Follows: a checkpoint quantised on one machine and opened on another may turn out to be lost. Check the size of W_q.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 hqq==0.2.8.post1 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

print({name: version(name) for name in ("hqq", "torch")})


def quantize(bits: int, outputs: int) -> HQQLinear:
    linear = torch.nn.Linear(64, outputs, bias=False)
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)  # a group is a row here
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


torch.manual_seed(0)
assert quantize(1, 32).dequantize().shape == (32, 64)
layer = quantize(1, 36)
state = layer.state_dict()
stored = state["W_q"].shape[0] * 8
print("36 rows of 64 in 1 bit: ready", layer.ready, "shape", state["shape"].tolist(), "scales", len(state["scale"]))
print("rows in the saved words:", stored)
assert layer.ready and state["shape"].tolist() == [36, 64] and len(state["scale"]) == 36
assert stored == 32, "all rows are stored now"
try:
    layer.dequantize()
except RuntimeError as error:
    print("dequantize:", error)
else:
    raise AssertionError("the weight can be restored now")
for bits, outputs in ((2, 18), (4, 19)):
    try:
        quantize(bits, outputs)
    except RuntimeError as error:
        print(f"{outputs} rows in {bits} bits are refused while packing:", error)
    else:
        raise AssertionError(f"{bits} bits take {outputs} rows now")
PYTHON
