"""What others write with options that change what the same tensors mean: read as meant, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.harness.families import build, tiny_config
from tests.harness.formats import Case, as_slice
from toolkit.checkpoint.files import declared_format
from toolkit.checkpoint.formats import packed_weights
from toolkit.checkpoint.stacks import plain_weights
from toolkit.checkpoint.weights import Unread
from toolkit.errors import ModelError

CT, ROUND, GPTQ = "compressed-tensors-int4-group", "auto-round-6-asym", "gptqmodel-v1-4-asym"


def transform(location: str) -> dict[str, Any]:
    """As compressed-tensors 0.19 writes one of SpinQuant's or QuIP's transforms."""
    place = {"targets": ["Linear"], "location": location, "inverse": False, "ignore": []}
    return {"transform_config": {"config_groups": {"R": {"type": "hadamard", "apply": [place]}}}}


CHANGED = [
    (CT, transform("input"), "a transform 'R' of activations, at 'input'"),
    (CT, transform("output"), "at 'output'"),
    (CT, {"transform_config": {"config_groups": 3}}, "of activations"),
    (CT, {"transform_config": [1]}, "of activations"),
    (ROUND, {"rotation_config": {"algorithm": "hadamard"}}, "a rotation of the inputs"),
    (ROUND, {"data_type": "mx_int"}, "'mx_int'"),
    (ROUND, {"extra_config": {"model": {"data_type": "nvfp4_v2"}}}, "'nvfp4_v2'"),
    (GPTQ, {"checkpoint_format": "marlin"}, "'marlin'"),
]


@pytest.mark.parametrize(("name", "more", "said"), CHANGED)
def test_what_a_config_says_of_the_inputs_or_codes_is_refused(name: str, more: dict[str, Any], said: str) -> None:
    case = Case(name)
    packed_weights(case.files())
    with pytest.raises(ModelError, match="which is not read; take the unquantised checkpoint") as refused:
        packed_weights(case.files(declared={**case.declared, **more}))
    assert said in str(refused.value)


def test_a_format_without_a_reader_is_named() -> None:
    case = Case("compressed-tensors-nvfp4")
    case.declared["config_groups"]["group_0"]["format"] = "nvfp4-e5m3-pack-quantized"
    with pytest.raises(ModelError, match="stored as nvfp4-e5m3-pack-quantized, which is not read"):
        packed_weights(case.files())


def test_a_transform_inside_the_weights_changes_nothing() -> None:
    case = Case(CT)
    found = packed_weights(case.files(declared={**case.declared, **transform("weight_input")}))
    assert found.keys() == case.expected.keys()


@pytest.mark.parametrize("part", ["v_input.weight", "theta", "act_pre_scale", "weight_correction"])
def test_a_part_that_nobody_knows_is_refused(part: str) -> None:
    case = Case(CT)
    module = next(iter(case.expected)).removesuffix(".weight")
    tensors = {**case.tensors, f"{module}.{part}": torch.ones(2, 2)}
    with pytest.raises(ModelError, match=f"{part}: a part of a quantised module"):
        packed_weights(case.files(tensors))


@pytest.mark.parametrize("part", ["bias", "input_scale", "activation_scale", "k_scale", "input_scale_ub", "act_max"])
def test_a_bias_and_scales_of_activations_are_no_part_of_a_weight(part: str) -> None:
    case = Case(CT)
    module = next(iter(case.expected)).removesuffix(".weight")
    tensors = {**case.tensors, f"{module}.{part}": torch.ones(2)}
    assert packed_weights(case.files(tensors)).keys() == case.expected.keys()


def test_rows_that_a_kernel_reordered_are_refused() -> None:
    case = Case("bitsandbytes-int8")
    key = next(key for key in case.tensors if key.endswith(".weight_format"))
    assert int(case.tensors[key]) == 0
    with pytest.raises(ModelError, match="rows in the tiles of a card's kernel, which is not read"):
        packed_weights(case.files({**case.tensors, key: torch.tensor(2, dtype=torch.uint8)}))


def test_scales_that_gptqmodel_divides_by_are_divided_by() -> None:
    case = Case("transformers-fp8-small-blocks")
    turned = {key: value.reciprocal() if key.endswith("_inv") else value for key, value in case.tensors.items()}
    told = {**case.declared, "weight_scale_semantics": "inverse"}
    found = packed_weights(case.files(turned, told))
    for name, wanted in case.expected.items():
        torch.testing.assert_close(as_slice(found[name], turned).read(), wanted.float())
    with pytest.raises(ModelError, match="says 'forward', which is not read"):
        packed_weights(case.files(turned, {**told, "weight_scale_semantics": "forward"}))


def one_module(inputs: int, groups: int, **declared: Any) -> Any:
    """A module of 4 bits as auto-round writes it, without an order of inputs."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "a.q.qweight": torch.randint(-(2**31), 2**31 - 1, (inputs // 8, 8), generator=generator).int(),
        "a.q.qzeros": torch.full((groups, 1), 0x77777777).int(),
        "a.q.scales": (1 + torch.arange(groups * 8).reshape(groups, 8)).half(),
    }
    case = Case(ROUND)
    told = {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq", **declared}
    return case.files(tensors, told, {}), tensors


@pytest.mark.parametrize("name", ["a.q", r".*\.q"])
def test_a_group_that_is_cut_off_is_as_wide_as_the_module_says(name: str) -> None:
    files, tensors = one_module(64, 2, group_size=32, extra_config={"b": {"group_size": 40}, name: {"group_size": 48}})
    codes = torch.stack([(tensors["a.q.qweight"] >> (4 * place)) & 15 for place in range(8)], 1).reshape(64, 8)
    wanted = (codes - 8) * tensors["a.q.scales"].float()[torch.arange(64) // 48]
    assert torch.equal(as_slice(packed_weights(files)["a.q.weight"], tensors).read(), wanted.T)


def test_a_group_of_no_known_width_is_refused() -> None:
    files, _ = one_module(64, 3, group_size=32, extra_config={"(": {"group_size": 24}})
    with pytest.raises(ModelError, match="no group_size makes 3 groups of 64 inputs"):
        packed_weights(files)


def test_blocks_of_gguf_in_safetensors_are_named() -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(quantization_config={"quant_method": "gguf", "bits": 4})
    with pytest.raises(ModelError, match="has blocks of GGUF in safetensors, which is not read; take the unquantised"):
        declared_format("folder", config)


def test_experts_as_unsloth_takes_gpt_oss_apart_are_put_together(tmp_path: Path) -> None:
    model = build(tiny_config("gpt_oss"))
    state, stored = model.state_dict(), {}
    for name, tensor in state.items():
        at, _, leaf = name.rpartition(".")
        if not at.endswith(".experts"):
            stored[name.replace(".router.", ".router.linear.")] = tensor
            continue
        role, kind = leaf.removesuffix("_bias"), "bias" if leaf.endswith("_bias") else "weight"
        for expert, part in enumerate(tensor):
            stored[f"{at}.{role}s.{expert}.{kind}"] = (part if kind == "bias" else part.T).contiguous()
    save_file(stored, tmp_path / "model.safetensors")
    found = plain_weights("tiny", tmp_path, {"quant_method": "bitsandbytes"}, model)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        part = found[name]
        assert torch.equal(part.read() if isinstance(part, Unread) else part[...], tensor), name
