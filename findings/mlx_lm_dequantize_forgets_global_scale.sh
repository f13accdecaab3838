#!/usr/bin/env bash
# mlx-lm 0.32.2 quantises experts to nvfp4 with a global scale for each expert where asked (quantize_model,
# global_scale=True). Its way back, dequantize_model, which `mlx_lm.convert -d` and `mlx_lm.fuse --dequantize` call too,
# leaves that scale out and says nothing: all weights of an expert come out larger by a factor of thousands.
# Follows: such a model, made plain again, answers nonsense, and nothing in its files shows why. mx.dequantize with the
# layer's own global_scale gives the true weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import dequantize_model, quantize_model

print({name: version(name) for name in ("mlx", "mlx-lm")})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = SwitchLinear(input_dims=32, output_dims=8, num_experts=2, bias=False)
        self.router = nn.Linear(32, 16, bias=False)


def largest(weight: mx.array) -> float:
    return mx.abs(weight).max().item()


mx.random.seed(0)
model = Model()
plain, router = model.experts.weight, model.router.weight
quantized, config = quantize_model(model, {}, None, None, mode="nvfp4", global_scale=True)
print("entry of the experts:", config["quantization"]["experts"])
layer = quantized.experts
true = [
    mx.dequantize(words, scales, group_size=16, bits=4, mode="nvfp4", global_scale=scale)
    for words, scales, scale in zip(layer.weight, layer.scales, layer.global_scale)
]
restored = dequantize_model(quantized)
print("router, largest weight: plain", largest(router), "restored", largest(restored.router.weight))
assert largest(restored.router.weight - router) < 0.1, "a layer without global scale is right"
for expert in range(2):
    sizes = [largest(weight[expert]) for weight in (plain, true, restored.experts.weight)]
    print(f"expert {expert}, largest weight: plain {sizes[0]}, with its scale {sizes[1]}, dequantize_model {sizes[2]}")
    assert largest(true[expert] - plain[expert]) < 0.1
    assert sizes[2] > 1000 * sizes[0], "dequantize_model applies the global scale now"
PYTHON
