#!/usr/bin/env bash
# layers_to_transform and exclude_modules of peft 0.21.2 (transformers 5.23.0) hold for target_modules alone. Parameters,
# which is what the experts of a MoE are, are adapted in every layer and in spite of every exclusion, where attention
# stays within them. Nothing is said. On the other hand rank_pattern and alpha_pattern do hold for parameters, and of them
# PEFT warns that their keys "did not match any targeted module and were ignored".
# Follows: an adapter "for the upper layers" has experts of all layers in it, which is most of its memory, and one whose
# warning is believed has another rank than its owner thinks. Name each layer in target_parameters instead
# ("layers.3.mlp.experts.down_proj"), and count.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" - <<'PYTHON'
import warnings
from importlib.metadata import version

from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

print({name: version(name) for name in ("peft", "transformers", "torch")})
config = Qwen3MoeConfig(
    vocab_size=32, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
)


def adapted(**settings):
    """Layers whose attention has an adapter, layers whose experts have one, ranks of the experts, PEFT's words."""
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = get_peft_model(Qwen3MoeForCausalLM(config), LoraConfig(r=8, **targets, **settings))
    factors = {name: value for name, value in model.state_dict().items() if ".lora_A." in name}
    layers = [{int(name.split(".layers.")[1][0]) for name in factors if part in name} for part in ("q_proj", "experts")]
    ranks = {value.shape[0] // 4 for name, value in factors.items() if "experts" in name}
    return *layers, ranks, [str(one.message) for one in heard if one.category is RuntimeWarning]


for settings in ({"layers_to_transform": [2]}, {"exclude_modules": r".*layers\.[01]\..*"}):
    attention, experts, _, said = adapted(**settings)
    print(settings, "attention in layers", attention, "experts in layers", experts, "said:", said)
    assert attention == {2} and experts == {0, 1, 2} and not said

_, _, ranks, said = adapted(rank_pattern={"experts.gate_up_proj": 2, "experts.down_proj": 2})
print("rank_pattern of 2: the experts' ranks are", ranks, "said:", said)
assert ranks == {2} and len(said) == 1 and "were ignored" in said[0]
print("seen: what bounds the layers is passed over in silence, and what is obeyed is said to be ignored")
PYTHON
