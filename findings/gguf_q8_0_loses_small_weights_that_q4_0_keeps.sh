#!/usr/bin/env bash
# Q8_0 is GGUF's "almost lossless" format: 8 bits for each weight, an fp16 scale for each 32. The scale is the block's largest
# weight divided by 127, and fp16 has no fine steps below 6e-5: it is rounded to multiples of 6e-8, and below 3e-8 to zero.
# So where the largest of a block is 1e-4 the scale is off by up to 4 percent, at 1e-5 by up to a third, and below 4e-6 the
# whole block is zero. Q4_0 divides by 8 in place of 127, so its scale is 16 times as large: of weights around 1e-5 it is
# the better format, at 1e-6 it has an error of a tenth where Q8_0 has nothing left. BF16 and MXFP4 get no worse.
# Usual weights, around 0.02, are stored well. gguf 0.19.0's own quantiser is measured here; the format allows no better
# scale. Nothing is raised or logged.
# Follows: the B matrices of adapters, which start at zero, and models whose weights are small by design lose most where
# nobody expects it. Write such an adapter in F32 or BF16, or divide A and multiply B by a power of two before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import gguf
import numpy as np

print({name: version(name) for name in ("gguf", "numpy")})
random = np.random.default_rng(0)
sizes = (2e-2, 1e-3, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
found = {}
for name in ("Q8_0", "Q5_0", "Q4_0", "MXFP4", "BF16"):
    kind = gguf.GGMLQuantizationType[name]
    for size in sizes:
        weights = (random.standard_normal((256, 256)) * size).astype(np.float32)
        read = gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
        found[name, size] = float(np.linalg.norm(read - weights) / np.linalg.norm(weights))
    print(f"{name}, relative error by size of the weights: " + ", ".join(f"{size:g}: {found[name, size]:.4f}" for size in sizes))
assert found["Q8_0", 2e-2] < 0.006 and found["Q4_0", 2e-2] > 0.08
assert found["Q8_0", 3e-5] > 5 * found["Q8_0", 2e-2]
assert found["Q8_0", 1e-5] > found["Q4_0", 1e-5] and found["Q8_0", 3e-6] > 2 * found["Q4_0", 3e-6]
assert found["Q8_0", 1e-6] > 0.99 and found["Q4_0", 1e-6] < 0.15
assert all(found["BF16", size] < 0.002 and found["MXFP4", size] < 0.13 for size in sizes)
print("seen: of small weights 8 bits keep less than 4")
PYTHON
