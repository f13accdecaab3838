#!/usr/bin/env bash
# mlx-lm 0.32.2 drops ERNIE 4.5's `moe_statics.e_score_correction_bias` when it loads or converts a checkpoint, and its
# model chooses experts without it. The published ones choose by score plus bias. Nothing is printed.
# Follows: tokens go to other experts than the model was trained with, and a file that mlx-lm wrote lacks the tensor, so
# that no other program can use it. With biases of zero both programs agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
import json
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

print({name: version(name) for name in ("mlx", "mlx-lm", "torch", "transformers")})
mx.set_default_device(mx.cpu)
WORDS = [3, 5, 9, 11, 33, 20]


def apart(bias: float) -> float:
    """How far mlx-lm's logits are from transformers', as a part of the largest."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1}
    layers = {"moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_layer_interval": 1}
    config = Ernie4_5_MoeConfig(
        vocab_size=101, num_key_value_heads=2, use_bias=False, tie_word_embeddings=False, **sizes, **experts, **layers
    )
    model = Ernie4_5_MoeForCausalLM(config).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(bias * torch.randn(tensor.shape))
        elif tensor.dim() > 1:
            tensor.normal_(std=0.2)
    folder = f"bias-{bias}"
    model.save_pretrained(folder)
    path = Path(folder, "config.json")
    told = {**config.to_dict(), **json.loads(path.read_text())}  # mlx-lm has other defaults, and wants all
    path.write_text(json.dumps({**told, "rope_theta": told["rope_parameters"]["rope_theta"]}))
    theirs, _ = load_model(Path(folder), lazy=True)
    with torch.no_grad():
        wanted = model(torch.tensor([WORDS])).logits[0]
    found = torch.tensor(np.array(theirs(mx.array([WORDS])).astype(mx.float32))[0])
    return float((found - wanted).abs().max() / wanted.abs().max())


without, with_bias = apart(0.0), apart(1.0)
print(f"logits apart from transformers': {without:.1e} with biases of zero, {with_bias:.2f} with others")
assert without < 1e-3
assert with_bias > 0.05, "mlx-lm takes the bias now"
PYTHON
