#!/usr/bin/env bash
# peft 0.21.2 on transformers 5.23.0 takes gate_proj, up_proj and down_proj for the names that experts had before they
# were stacked, and moves them from target_modules to the experts' parameters: for new adapters too, and for "all-linear".
# In families with shared experts or dense layers (DeepSeek, GLM-4, Qwen3-Next, Ernie …) these have linears of the same
# names, and nobody targets them any more. So "all-linear" trains no shared expert and no dense layer, the two parts that
# see every token. Whoever names one such linear in full (model.layers.0.mlp.down_proj) gets the experts of every layer in
# its place. And of an adapter that has them, stored expert by expert, they are dropped when it is opened. No message
# tells: leftover keys are not reported.
# Follows: count what carries an adapter. Name such linears by their weight ("shared_experts.down_proj.weight") in
# target_parameters; load an adapter's file yourself where it holds them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" - <<'PYTHON'
import json
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

print({name: version(name) for name in ("peft", "transformers", "torch")})
torch.manual_seed(0)


def made():
    """A dense layer and a MoE layer with a shared expert."""
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(
            vocab_size=32, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
            n_shared_experts=1, first_k_dense_replace=1,
        )
    )


def places(model):
    names = {name.split(".lora_A")[0].removeprefix("base_model.model.model.") for name in model.state_dict()
             if ".lora_A" in name}
    return sorted(name for name in names if "self_attn" not in name)


linears = sorted(
    name.removeprefix("model.")
    for name, module in made().named_modules()
    if isinstance(module, torch.nn.Linear) and name.endswith(("gate_proj", "up_proj", "down_proj"))
)
print("linears of the dense layer and the shared expert:", linears)
assert len(linears) == 6
for wanted in ("all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"]):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        got = places(get_peft_model(made(), LoraConfig(target_modules=wanted)))
    print(wanted, "adapts, beside attention:", got)
    assert "layers.1.mlp.experts" in got and not set(linears) & set(got)
    assert not [one for one in heard if "shared" in str(one.message) or "dense" in str(one.message)]
got = places(get_peft_model(made(), LoraConfig(target_modules=["model.layers.0.mlp.down_proj"])))
print("model.layers.0.mlp.down_proj alone, the dense layer's, adapts:", got)
assert got == ["layers.1.mlp.experts"]

tensors = {}
for name, module in made().named_modules():
    single = [f"{name}.{e}.{part}" for e in range(4) for part in ("gate_proj", "up_proj", "down_proj")]
    for path in single if name.endswith(".experts") else [name] if name.removeprefix("model.") in linears else []:
        if isinstance(module, torch.nn.Linear):
            inputs, outputs = module.in_features, module.out_features
        else:
            inputs, outputs = (16, 32) if path.endswith("down_proj") else (32, 16)
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(4, inputs)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(outputs, 4)
save_file(tensors, "adapter_model.safetensors")
fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
Path("adapter_config.json").write_text(json.dumps(fields))
model = made()
before = {name: value.clone() for name, value in model.state_dict().items()}
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    after = PeftModel.from_pretrained(model, ".").merge_and_unload().state_dict()
moved = sorted(name.removeprefix("model.") for name in before if not torch.equal(before[name], after[name]))
print(f"an adapter of {len(tensors) // 2} pairs, opened, changes:", moved)
assert moved == ["layers.1.mlp.experts.down_proj", "layers.1.mlp.experts.gate_up_proj"]
assert not [one for one in heard if "unexpected" in str(one.message).lower() or "missing" in str(one.message).lower()]
print("seen: shared experts and dense layers get no adapter, and lose the one that they had")
PYTHON
