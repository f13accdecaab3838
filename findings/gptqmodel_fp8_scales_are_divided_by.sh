#!/usr/bin/env bash
# GPTQModel 7.7.0 saves FP8 with quant_method "fp8" and `weight_scale_inv`, names that DeepSeek's and transformers' FP8
# have. There the scales multiply, in spite of their name; GPTQModel means it: its own reader divides by them. The only
# hint is `weight_scale_semantics: inverse` in the config, which nothing else knows.
# Follows: transformers loads such a file without a word, and every weight is larger by the square of its scale, here some
# fifty million times. Whoever reads quant_method "fp8" has to look for that key.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install -q --disable-pip-version-check "$@"; }
pip torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 datasets==5.2.0 pillow==13.0.0 \
    protobuf==7.36.2 requests==2.34.2 defuser==0.0.28 device-smi==0.5.7 logbar==0.4.15 pypcre==0.6.4 \
    tokenicer==0.0.14 threadpoolctl==3.8.0 torchao==0.18.0 setuptools==84.2.1
pip --no-deps --no-build-isolation GPTQModel==7.7.0
cd "$folder"  # where GPTQModel writes its log
HF_HUB_OFFLINE=1 GPTQMODEL_CPU_WORKERS=2 "$folder/venv/bin/python" - <<'PYTHON' 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
import json
from importlib.metadata import version
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.fp8 import TorchFP8Linear
from gptqmodel.quantization.config import FP8Config
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

print({name: version(name) for name in ("GPTQModel", "torch", "transformers")})
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=101, num_key_value_heads=4, **sizes)).bfloat16()
how = FP8Config(weight_scale_method="block", weight_block_size=[16, 16], offload_to_disk=False)
tensors, theirs = {}, {}
for name, tensor in model.state_dict().items():
    if not name.endswith("_proj.weight"):
        tensors[name] = tensor
        continue
    linear = nn.Linear(*reversed(tensor.shape), bias=False)
    linear.weight = nn.Parameter(tensor.float())
    shape = {"in_features": linear.in_features, "out_features": linear.out_features}
    layer = TorchFP8Linear(bits=8, group_size=-1, sym=True, desc_act=False, **shape, **how.quant_linear_init_kwargs())
    layer.pack_original(linear, None, None)
    tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in layer.state_dict().items()}
    theirs[name] = layer.dequantize_weight(dtype=torch.float32).T
how.save_pretrained(".")
told = json.loads(Path("quantize_config.json").read_text())
print({key: told[key] for key in ("quant_method", "weight_block_size", "weight_scale_semantics")})
Path("model").mkdir()
save_file({name: value.contiguous() for name, value in tensors.items()}, "model/model.safetensors", {"format": "pt"})
Path("model/config.json").write_text(json.dumps({**model.config.to_dict(), "quantization_config": told}))

loaded = AutoModelForCausalLM.from_pretrained("model", quantization_config=FineGrainedFP8Config(dequantize=True))
name = "model.layers.0.mlp.up_proj.weight"
plain, by_itself, by_stock = (w.float().norm() for w in (model.get_parameter(name), theirs[name], loaded.get_parameter(name)))
print(f"norm of {name}: plain {plain:.3f}, GPTQModel's own reader {by_itself:.3f}, transformers {by_stock:.3g}")
assert abs(by_itself / plain - 1) < 0.05
assert by_stock > 1000 * plain, "the same file means the same to both now"
PYTHON
