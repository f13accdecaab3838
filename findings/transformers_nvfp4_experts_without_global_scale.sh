#!/usr/bin/env bash
# transformers 5.23.0, loading a Mixture-of-Experts model that compressed-tensors or LLM Compressor stored in NVFP4,
# multiplies its experts by the scales of their groups and leaves weight_global_scale out, by which they are to be
# divided. All experts come out thousands of times too large, each by its own factor; attention, in the same file and
# the same format, is right. No message tells: nothing is missing, nothing is unexpected. It makes no difference whether
# the model is asked for as it is or with dequantize=True.
# Follows: such a model loads, runs and answers nonsense, and what is saved or trained from it is wrong. Divide by
# weight_global_scale oneself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.1 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

print({name: version(name) for name in ("transformers", "compressed-tensors", "torch")})
config = Qwen3MoeConfig(
    vocab_size=32, hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, dtype="bfloat16",
)
torch.manual_seed(0)
plain = Qwen3MoeForCausalLM(config)
plain.save_pretrained("model")
scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
scheme.format = "nvfp4-pack-quantized"
compressor = BaseCompressor.get_value_from_registry(scheme.format)
tensors = load_file("model/model.safetensors")
for name in [name for name in tensors if name.endswith("_proj.weight")]:
    weight = tensors.pop(name)
    whole = generate_gparam(weight.min(), weight.max())
    groups = weight.unflatten(1, (-1, 16))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=whole)
    given = {"weight": weight, "weight_scale": scale, "weight_global_scale": whole}
    for part, tensor in compressor.compress(given, scheme).items():
        tensors[name.removesuffix("weight") + part] = tensor.contiguous()
save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
quantised = QuantizationConfig(
    config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*mlp.gate$"], format=scheme.format,
    quantization_status="compressed",
)
config.quantization_config = quantised.model_dump(mode="json") | {"quant_method": "compressed-tensors"}
config.save_pretrained("model")


def largest(model: torch.nn.Module, name: str) -> float:
    return model.model.layers[0].get_parameter(name).abs().max().item()


asked = {"as it is": {}, "multiplied out": {"quantization_config": CompressedTensorsConfig(dequantize=True)}}
for how, given in asked.items():
    loaded, report = AutoModelForCausalLM.from_pretrained("model", output_loading_info=True, **given)
    told = {what: sorted(names) for what, names in report.items() if names}
    assert not told, f"a load that tells of something: {told}"
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        before, after = largest(plain, name), largest(loaded, name)
        print(f"{how}: {name}, largest weight {before:.3f} before, {after:.1f} loaded")
        assert after > 1000 * before, "experts have their global scale now"
before, after = (largest(model, "self_attn.q_proj.weight") for model in (plain, loaded))
assert abs(after - before) < 0.1 * before, "attention is right"
PYTHON
