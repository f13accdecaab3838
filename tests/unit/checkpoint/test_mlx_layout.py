"""What mlx-lm's converter makes of a checkpoint is read as what it was made of: its layout law by law, in floats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from tests.harness.families import build, tiny_config
from toolkit.checkpoint.files import declared_format
from toolkit.errors import ModelError
from toolkit.quant import load_int8
from toolkit.quant.load import read_config

FAMILIES = (
    *("qwen3_moe", "mixtral", "qwen3_next", "qwen3_5_moe_text", "lfm2_moe", "nemotron_h", "jamba", "deepseek_v3"),
    *("glm4_moe_lite", "granitemoehybrid", "laguna"),
)
NAMES = {
    "lfm2_moe": ((".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj.")),
    "nemotron_h": ((".switch_mlp.up_proj.", ".switch_mlp.fc1."), (".switch_mlp.down_proj.", ".switch_mlp.fc2.")),
    "laguna": ((".mlp.gate.weight", ".mlp.gate.proj.weight"),),
    "qwen3_5_moe_text": (("model.layers", "language_model.model.layers"), ("lm_head", "language_model.lm_head")),
}
NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm", "q_norm", "k_norm")


def stored(state: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """As the family's `sanitize` in mlx-lm 0.32.2 leaves it."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        module = key.removesuffix(".weight")
        if key.endswith(".kv_b_proj.weight"):
            heads = value.unflatten(0, (config.num_attention_heads, -1))
            at, plain = module.removesuffix("kv_b_proj"), config.qk_nope_head_dim
            result[f"{at}embed_q.weight"] = heads[:, :plain].transpose(1, 2)
            result[f"{at}unembed_out.weight"] = heads[:, plain:]
        elif module.endswith((".conv1d", ".conv.conv")):
            result[key] = value.transpose(1, 2)
        elif config.model_type.startswith(("qwen3_next", "qwen3_5")) and module.endswith(NORMS):
            result[key] = value + 1
        elif key.endswith(".experts.gate_up_proj"):
            at = key.replace("experts.gate_up_proj", "switch_mlp")
            gate, up = value.chunk(2, 1)
            result |= {f"{at}.gate_proj.weight": gate, f"{at}.up_proj.weight": up}
        elif key.endswith((".experts.down_proj", ".experts.up_proj")):
            result[f"{key.replace('experts', 'switch_mlp')}.weight"] = value
        else:
            result[key] = value
    for old, new in NAMES.get(config.model_type, ()):
        result = {key.replace(old, new): value for key, value in result.items()}
    return {key: value.contiguous() for key, value in result.items()}


def write(folder: Path, tensors: dict[str, Tensor], config: PretrainedConfig) -> str:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "mlx"})
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_the_publishers(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    state = build(config).state_dict()
    folder = write(tmp_path, stored(state, config), config)
    found = load_int8(folder, experts="none", linears="none", experts_implementation="eager")[0].state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        if torch.equal(found[name], tensor):
            continue
        assert family.startswith("qwen3_"), name
        assert torch.equal(1 + found[name], 1 + tensor), name  # what such a norm multiplies by


def test_floats_of_mlx_are_known_by_the_header(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe")
    folder = write(tmp_path, stored(build(config).state_dict(), config), config)
    assert declared_format(folder, read_config(folder)) == {"quant_method": "mlx"}
    assert load_int8(folder)[1].stacks_stored == {"int8": 2 * config.num_hidden_layers}


def test_half_of_latent_attention_is_refused(tmp_path: Path) -> None:
    config = tiny_config("deepseek_v3")
    tensors = stored(build(config).state_dict(), config)
    del tensors["model.layers.0.self_attn.unembed_out.weight"]
    folder = write(tmp_path, tensors, config)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.0\.self_attn\.kv_b_proj\.weight"):
        load_int8(folder, experts="none", linears="none")


def test_a_text_model_inside_a_larger_config_is_read(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = tiny_config("qwen3_5_moe_text")
    state = build(config).state_dict()
    tensors = {f"language_model.{key}": value for key, value in stored(state, config).items()}
    tensors = {key.replace("language_model." * 2, "language_model."): value for key, value in tensors.items()}
    whole = AutoConfig.for_model("qwen3_5_moe", text_config=config.to_dict())
    folder = write(tmp_path, tensors, whole)
    found = load_int8(folder, experts="none", linears="none", experts_implementation="eager")[0].state_dict()
    assert all(torch.equal(1 + found[name], 1 + tensor) for name, tensor in state.items())
