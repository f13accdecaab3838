"""A GGUF LoRA has llama.cpp's names, shapes and order of rows; what it cannot hold is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness.families import build, tiny_config
from toolkit.adapters.layouts import Factors, pieces
from toolkit.architecture import describe
from toolkit.errors import ModelError
from toolkit.export.gguf import read_gguf, write_gguf

gguf = pytest.importorskip("gguf")


def adapter(model: torch.nn.Module) -> list[Factors]:
    """Random factors for the first layer's stacks, router, query and key, with a scaling."""
    generator = torch.Generator().manual_seed(0)

    def factors(parameter: str, experts: int, outputs: int, inputs: int, *, is_transposed: bool = False) -> Factors:
        A = torch.randn(experts, 3, inputs, generator=generator)
        B = torch.randn(experts, outputs, 3, generator=generator)
        return Factors(parameter, parameter, A, B, 1.5, is_transposed, experts > 1)

    layer = describe(model).layers[-1]
    found = []
    for name in layer.stacks:
        shape = model.get_parameter(name).shape
        outputs, inputs = (shape[2], shape[1]) if layer.is_transposed else (shape[1], shape[2])
        found.append(factors(name, shape[0], outputs, inputs, is_transposed=layer.is_transposed))
    others = [f"{layer.router}.weight"]
    others += [f"{linear}.weight" for linear in describe(model).linear_names("attention") if linear[-6:-5] in "qk"][:2]
    return found + [factors(name, 1, *model.get_parameter(name).shape) for name in others]


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(str(path)).tensors}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "olmoe"])
def test_each_part_has_its_tensor_in_the_right_order(family: str, tmp_path: Path) -> None:
    model = build(tiny_config(family))
    parts = adapter(model)
    write_gguf(parts, model, tmp_path / "adapter.gguf")
    assert read_gguf(tmp_path / "adapter.gguf", parts, model) < 1e-6
    found = stored(tmp_path / "adapter.gguf")
    updates = {name.removesuffix(".weight.lora_b"): B @ found[name.replace("lora_b", "lora_a")]
               for name, B in found.items() if name.endswith("lora_b")}  # fmt: skip
    layer = describe(model).layers[-1]
    block = f"blk.{layer.name.split('.layers.')[1].split('.')[0]}"
    by_parameter = {factors.parameter: factors for factors in parts}
    up, down = (torch.stack([by_parameter[name].update(e) for e in range(layer.num_experts)]) for name in layer.stacks)
    gate, up = (up[:, ::2], up[:, 1::2]) if family == "gpt_oss" else up.chunk(2, dim=1)
    wanted = {"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": down}
    wanted["ffn_gate_inp"] = by_parameter[f"{layer.router}.weight"].update(0)
    for name, update in wanted.items():
        torch.testing.assert_close(updates[f"{block}.{name}"], update)
    config = model.config
    for name, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
        (tensor,) = (key for key in updates if key.endswith(name))
        update = next(f for f in parts if f".{name[-1]}_proj." in f.parameter).update(0)
        if family in ("mixtral", "granitemoe"):  # neighbours are turned there, halves here
            size = update.shape[0] // heads
            order = [head * size + half * size // 2 + i
                     for head in range(heads) for i in range(size // 2) for half in range(2)]  # fmt: skip
            update = update[order]
        torch.testing.assert_close(updates[tensor], update)


def test_a_family_or_part_that_llama_cpp_lacks_is_one_line(tmp_path: Path) -> None:
    model = build(tiny_config("flex_olmo"))
    with pytest.raises(ModelError, match=r"llama\.cpp has no architecture for flex_olmo: export as") as caught:
        write_gguf(adapter(model), model, tmp_path / "adapter.gguf")
    assert "\n" not in str(caught.value)
    model = build(tiny_config("deepseek_v2"))
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    shape = model.get_parameter(name).shape
    latent = Factors(name, name, torch.ones(1, 2, shape[1]), torch.ones(1, shape[0], 2), 1.0)
    assert pieces(latent, model)
    with pytest.raises(ModelError, match=r"no adapter on model\.layers\.0\.self_attn\.kv_b_proj.* two tensors"):
        write_gguf([latent], model, tmp_path / "adapter.gguf")
