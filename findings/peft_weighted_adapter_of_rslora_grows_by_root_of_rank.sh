#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter folds each adapter's scaling into the factors of the new one, and gives it alpha = rank,
# so that its own scaling is 1. But it keeps use_rslora of the first adapter, and under rsLoRA alpha = rank is a scaling of the
# root of the rank. So whatever is mixed comes out too large by that: 4 times at rank 16, and "cat", whose rank is
# the sum, by more than "linear" for the same adapters. A copy of one adapter with weight 1.0 is already wrong. Nothing is
# said. (Adapters without rsLoRA are mixed rightly.)
# Follows: mixtures of rsLoRA adapters seem overtrained. Divide the weights by the root of the new rank, or set
# peft_config[name].lora_alpha and each layer's scaling[name] yourself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy==2.4.6
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model

print({name: version(name) for name in ("peft", "torch", "transformers")})


def grown(use_rslora: bool, combination: str, rank: int) -> tuple[float, float]:
    """How many times the sum of two adapters' changes the change of their mixture is, and its expected error."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False, use_rslora=use_rslora
    )
    model = get_peft_model(model, config, "one")
    model.add_adapter("two", config)
    options = {"svd_rank": 2 * rank} if combination == "svd" else {}
    names = ["one"] if combination == "linear" else ["one", "two"]
    model.add_weighted_adapter(names, [1.0] * len(names), "mixed", combination_type=combination, **options)
    layer = model.base_model.model[0]
    true = sum(layer.get_delta_weight(name) for name in names)
    mixed = layer.get_delta_weight("mixed")
    ratio = ((mixed * true).sum() / true.square().sum()).item()
    return ratio, ((mixed / ratio - true).norm() / true.norm()).item()


for combination in ("linear", "cat", "svd"):
    for rank in (4, 16):
        new_rank = rank if combination == "linear" else 2 * rank
        (plain, error), (rslora, rslora_error) = (grown(use, combination, rank) for use in (False, True))
        print(f"{combination}, rank {rank}, new rank {new_rank}: {plain:.3f} times the true change, with rsLoRA {rslora:.3f}")
        assert max(error, rslora_error) < 1e-4 and abs(plain - 1) < 1e-4
        assert abs(rslora / new_rank**0.5 - 1) < 1e-4
print("seen: mixtures of rsLoRA adapters are too large by the root of the new rank")
PYTHON
