#!/usr/bin/env bash
# A GGUF file of Qwen3-MoE says how wide its experts are: `qwen3moe.expert_feed_forward_length`. transformers 5.23.0
# reads the other sizes but not this one, so AutoConfig.from_pretrained(…, gguf_file=…) always gives
# moe_intermediate_size 768, the default, which is right for Qwen3-30B-A3B alone. Nothing is said.
# Follows: whoever plans memory by that config, or makes a model from it, has experts of another size (those of
# Qwen3-235B-A22B are 1536 wide). Take the width from the file, or from the shapes of its tensors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 gguf==0.19.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from gguf import GGUFReader, GGUFWriter
from transformers import AutoConfig

print({name: version(name) for name in ("transformers", "gguf")})
for width in (24, 1536):
    writer = GGUFWriter("model.gguf", "qwen3moe")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(width)
    for name, shape in (("gate", (4, width, 32)), ("up", (4, width, 32)), ("down", (4, 32, width))):
        writer.add_tensor(f"blk.0.ffn_{name}_exps.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    stated = GGUFReader("model.gguf").fields["qwen3moe.expert_feed_forward_length"].contents()
    config = AutoConfig.from_pretrained(".", gguf_file="model.gguf")
    print(f"the file: {stated}; the config: {config.moe_intermediate_size} (experts: {config.num_experts})")
    assert stated == width and (config.num_experts, config.intermediate_size) == (4, 48)
    assert config.moe_intermediate_size == 768, "the width is read from the file now"
PYTHON
