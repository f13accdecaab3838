#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter mixes the factors A and B and nothing else. What else an adapter was trained to, it
# leaves as a fresh adapter has it: DoRA's magnitudes are the base weight's own norms, and the bias of B (lora_bias) is
# drawn at random or zero. The new adapter still is a DoRA adapter, or one with biases, so nothing looks amiss; nothing is
# raised or logged. A copy of one adapter with weight 1.0 is not that adapter, in any combination_type.
# Follows: mixtures of DoRA adapters lose what DoRA adds. Copy lora_magnitude_vector and lora_B[name].bias by hand (for
# several adapters there is no sum that is right for DoRA: merge the weights instead).
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


def difference(kind: str, combination: str, by_hand: bool = False) -> float:
    """How far a copy (one adapter, weight 1.0) is from its adapter: of the change of the outputs, the share that is wrong."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False))
    options = {} if kind == "plain" else {kind: True}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False, **options)
    model = get_peft_model(model, config, "one")
    layer, rows = model.base_model.model[0], torch.randn(64, 32)
    if kind == "use_dora":
        layer.lora_magnitude_vector["one"].weight.data *= 1 + torch.rand(32)
    if kind == "lora_bias":
        layer.lora_B["one"].bias.data.normal_()
    model.add_weighted_adapter(["one"], [1.0], "copy", combination_type=combination, **({"svd_rank": 4} if combination == "svd" else {}))
    if by_hand and kind == "use_dora":
        layer.lora_magnitude_vector["copy"].weight.data.copy_(layer.lora_magnitude_vector["one"].weight.data)
    if by_hand and kind == "lora_bias":  # the scaling of "one" is 2, that of "copy" 1
        layer.lora_B["copy"].bias.data.copy_(layer.lora_B["one"].bias.data * layer.scaling["one"])
    changes = []
    for name in ("one", "copy"):
        model.set_adapter(name)
        changes.append((model(rows) - layer.base_layer(rows)).detach())
    return ((changes[1] - changes[0]).norm() / changes[0].norm()).item()


for kind in ("plain", "use_dora", "lora_bias"):
    seen = {combination: difference(kind, combination) for combination in ("linear", "cat", "svd")}
    print(f"{kind}: share of the change that a copy has wrong:", {name: round(value, 3) for name, value in seen.items()})
    assert all(value < 1e-4 if kind == "plain" else value > 0.3 for value in seen.values())
    fixed = difference(kind, "cat", by_hand=True)
    print(f"{kind}: with magnitudes or biases copied by hand: {fixed:.0e}")
    assert fixed < 1e-4
print("seen: a weighted adapter has the factors of its parts, and not their magnitudes and biases")
PYTHON
