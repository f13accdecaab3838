#!/usr/bin/env bash
# transformers 5.23.0, loading a checkpoint with `quant_method: "fp8"` and dequantize=True, does not take the size of
# the blocks from weight_block_size: it divides the rows of a weight by the rows of its scales. Where the last block is
# not full that gives another size, and where it divides evenly nobody hears of it. 192 rows in blocks of 128 have two
# rows of scales, so it takes blocks of 96, and rows 96 to 127 get the second block's scale instead of the first's.
# Follows: a sixth of such a matrix is wrong in memory and in all that is saved from it. Multiply the scales out
# oneself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

print({name: version(name) for name in ("transformers", "torch")})
config = LlamaConfig(
    vocab_size=32, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=False, dtype="float32",
)
LlamaForCausalLM(config).save_pretrained("model")
tensors = load_file("model/model.safetensors")
for name in [name for name in tensors if name.endswith("_proj.weight")]:
    rows, columns = tensors[name].shape
    tensors[name] = torch.ones(rows, columns).to(torch.float8_e4m3fn)
    by_block = torch.arange(1.0, 1 + -(-rows // 128))[:, None]  # 1 for the first block of rows, 2 for the second
    tensors[name.removesuffix("weight") + "weight_scale_inv"] = by_block.repeat(1, -(-columns // 128))
save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
config.save_pretrained("model")
loaded = AutoModelForCausalLM.from_pretrained(
    "model", quantization_config=FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True)
)
weight = loaded.model.layers[0].mlp.gate_proj.weight
ones, twos = (int((weight[:, 0] == value).sum()) for value in (1, 2))
print(f"192 rows: {ones} with the first block's scale, {twos} with the second's; the file says 128 and 64")
assert torch.equal(loaded.model.layers[0].self_attn.q_proj.weight, torch.ones(128, 128)), "a full block is right"
assert (ones, twos) == (96, 96), "the blocks have their own size now"
PYTHON
