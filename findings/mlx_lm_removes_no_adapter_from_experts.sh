#!/usr/bin/env bash
# mlx-lm 0.32.2: remove_lora_layers, which gives a model back without its adapter, knows LoRA on linears alone. LoRA on
# experts (LoRASwitchLinear), on embeddings, and DoRA stay in place and stay active. On a MoE that is most of the adapter.
# Nothing is raised, and the model goes on answering, half adapted: neither as the base nor as with the adapter.
# Follows: comparisons of "with and without the adapter" on a MoE are wrong, and a second adapter is put on top of the
# first. Put the layers' own `linear` back yourself, or load the model again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.models import qwen3_moe
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

print({name: version(name) for name in ("mlx", "mlx-lm")})
mx.random.seed(0)
model = qwen3_moe.Model(
    qwen3_moe.ModelArgs(
        model_type="qwen3_moe", hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2,
        num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=16,
        rms_norm_eps=1e-6, vocab_size=32, num_key_value_heads=2, head_dim=16, rope_theta=1e4, tie_word_embeddings=False,
        max_position_embeddings=64, norm_topk_prob=True,
    )
)
tokens = mx.array([[1, 2, 3, 4]])
base = model(tokens)
linear_to_lora_layers(model, 1, {"rank": 4, "scale": 20.0, "dropout": 0.0})
adapters = [module for _, module in model.named_modules() if hasattr(module, "lora_b")]
for module in adapters:
    module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
adapted = model(tokens)
remove_lora_layers(model)
removed = model(tokens)
left = [name for name, module in model.named_modules() if hasattr(module, "lora_b")]
far, near = (mx.abs(base - other).max().item() for other in (adapted, removed))
print(f"{len(adapters)} adapters; logits differ from the base's by {far:.2f} with them, by {near:.2f} once they are removed")
print("still there:", left)
assert sorted(name.rpartition(".")[2] for name in left) == ["down_proj", "gate_proj", "up_proj"]
assert all("switch_mlp" in name for name in left) and near > 0.1
print("seen: the experts keep their adapter when it is removed")
PYTHON
