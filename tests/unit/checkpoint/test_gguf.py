"""A GGUF file gives back the model that was written into it: every parameter, its config, every block type."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from tests.harness.families import families, tiny_config
from toolkit.architecture import auto_class
from toolkit.checkpoint.conversion import targets
from toolkit.checkpoint.formats.gguf_config import model_types
from toolkit.checkpoint.formats.gguf_undo import ON_A_CARD, by_gguf, by_torch
from toolkit.checkpoint.weights import PackedSlice
from toolkit.errors import ModelError
from toolkit.families import GGUF_READ

gguf = pytest.importorskip("gguf")

from tests.harness.as_gguf import CONFIGS, as_llama_cpp, stored, tiny, write_gguf  # noqa: E402
from toolkit.checkpoint.formats.gguf import GgufCheckpoint, read_gguf  # noqa: E402

TOKENS = torch.randint(0, 64, (1, 17), generator=torch.Generator().manual_seed(5))
NOT_TO_THE_BIT = {"qwen3_5_moe_text"}
"""Norms are stored with one added, and decays as exponentials: fp32 rounds on the way there."""
NUMBERS_OR_NOTHING = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0"}
KINDS = [kind for kind in gguf.GGML_QUANT_SIZES if kind.name not in NUMBERS_OR_NOTHING]
QUANTISED = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"}
"""Types that the library can make in Python; of the others any bytes are a weight."""


def rows(found: GgufCheckpoint, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
    """Rows of a parameter, read as the loader reads them: only the parts that they are made of."""
    return PackedSlice(found.weights[name], found.slices)[first:last].read()


@torch.no_grad()
def loaded(found: GgufCheckpoint) -> PreTrainedModel:
    model = auto_class(found.config).from_config(found.config, dtype=torch.float32).eval()
    state = model.state_dict()
    assert found.weights.keys() == state.keys() - set(model.all_tied_weights_keys)
    for name in found.weights:
        state[name].copy_(rows(found, name))
    return model


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_comes_back(family: str, kind: str, tmp_path: Path) -> None:
    original = tiny(family)
    block = gguf.GGMLQuantizationType[kind]
    found = read_gguf(write_gguf(tmp_path / "model.gguf", original, kind=block))
    assert (found.config_from, found.left_out) == ("metadata", ())
    assert set(found.stored) == {"F32", kind}
    model = loaded(found)
    wanted, there = stored(as_llama_cpp(original), block), as_llama_cpp(model)
    assert wanted.keys() == there.keys()
    for name, tensor in wanted.items():
        bound = 2e-7 if family in NOT_TO_THE_BIT and re.search(r"norm|ssm_a$", name) else 0
        np.testing.assert_allclose(there[name], tensor, rtol=bound, atol=bound, err_msg=name)
    if kind == "F32":
        with torch.no_grad():
            ours, theirs = model(TOKENS).logits, original(TOKENS).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if family in NOT_TO_THE_BIT else 0)


@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_of_rows_and_single_experts_are_those_of_the_whole(family: str, tmp_path: Path) -> None:
    found = read_gguf(write_gguf(tmp_path / "model.gguf", tiny(family), kind=gguf.GGMLQuantizationType.Q8_0))
    for name, weight in found.weights.items():
        whole = rows(found, name)
        assert whole.shape == weight.shape
        for first in range(0, weight.shape[0], weight.step):
            last = min(first + weight.step, weight.shape[0])
            assert torch.equal(rows(found, name, first, last), whole[first:last]), name
        if ".experts." in name:
            assert weight.step == 1


def test_what_is_stored_as_it_is_needs_no_unpacking(tmp_path: Path) -> None:
    original = tiny("qwen3_moe")
    found = read_gguf(write_gguf(tmp_path / "model.gguf", original, kind=gguf.GGMLQuantizationType.Q8_0))
    assert {"model.norm.weight", "model.layers.1.mlp.gate.weight"} <= found.plain.keys()
    assert all(not re.search(r"experts|q_proj", name) for name in found.plain)
    for name, key in found.plain.items():
        assert torch.equal(found.slices[key][...], original.state_dict()[name])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_block_type_is_worth_what_gguf_says(kind: Any, tmp_path: Path) -> None:
    """In all experts of a layer: the values are to the bit those of the library's own function."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    width = max(32, block)
    original = tiny("qwen3_moe", moe_intermediate_size=width, hidden_size=width, num_hidden_layers=1)
    chance = np.random.default_rng(int(kind))
    tensors = as_llama_cpp(original)
    raw = {}
    for name, value in tensors.items():
        if "_exps." in name:
            quantised = gguf.quants.quantize(value, kind) if kind.name in QUANTISED else None
            shape = (*value.shape[:-1], value.shape[-1] // block * size)
            raw[name] = (chance.integers(0, 256, shape, dtype=np.uint8) if quantised is None else quantised, kind)
    found = read_gguf(write_gguf(tmp_path / "model.gguf", original, raw=raw))
    assert found.weights["model.layers.0.mlp.experts.down_proj"].stored == kind.name
    with np.errstate(all="ignore"):
        gate, up, down = (
            gguf.quants.dequantize(raw[f"blk.0.ffn_{which}_exps.weight"][0].view(np.uint8), kind)
            for which in ("gate", "up", "down")
        )
    both = rows(found, "model.layers.0.mlp.experts.gate_up_proj")
    np.testing.assert_array_equal(both.view(torch.int32), np.concatenate([gate, up], axis=1).view(np.int32))
    np.testing.assert_array_equal(
        rows(found, "model.layers.0.mlp.experts.down_proj").view(torch.int32), down.view(np.int32)
    )


@pytest.mark.parametrize("kind", sorted(ON_A_CARD))
def test_what_a_card_computes_is_the_same_to_the_bit(kind: str) -> None:
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = torch.randint(0, 256, (3, 16, 4 * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted, found = by_gguf(blocks, kind), by_torch(blocks, kind)
    assert torch.isfinite(wanted).float().mean() > 0.5
    assert torch.equal(wanted.isnan(), found.isnan())
    assert torch.equal(wanted.nan_to_num(), found.nan_to_num())


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "I32"])
def test_a_type_that_nobody_multiplies_out_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    original = tiny("qwen3_moe", moe_intermediate_size=256, num_hidden_layers=1)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = np.zeros((8, 64, 256 // block * size), dtype=np.uint8)
    raw = {"blk.0.ffn_down_exps.weight": (blocks, gguf.GGMLQuantizationType[kind])}
    with pytest.raises(ModelError, match=rf"blk\.0\.ffn_down_exps\.weight is {kind}, which the gguf library cannot"):
        read_gguf(write_gguf(tmp_path / "model.gguf", original, raw=raw))


@pytest.mark.parametrize("scales", [8, 1, 0])
def test_nvfp4_is_multiplied_by_its_scales(scales: int, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.NVFP4
    original = tiny("qwen3_moe", moe_intermediate_size=64, num_hidden_layers=1)
    tensors = as_llama_cpp(original)
    blocks = np.random.default_rng(0).integers(0, 127, (8, 64, 36), dtype=np.uint8)
    scale = np.linspace(0.5, 3, scales, dtype=np.float32)
    if scales:
        tensors |= {"blk.0.ffn_down_exps.scale": scale, "blk.0.ffn_down_exps.input_scale": scale}
    path = write_gguf(tmp_path / "model.gguf", original, tensors, raw={"blk.0.ffn_down_exps.weight": (blocks, kind)})
    found = read_gguf(path)
    wanted = gguf.quants.dequantize(blocks, kind) * (scale.reshape(-1, 1, 1) if scales else 1)
    name = "model.layers.0.mlp.experts.down_proj"
    np.testing.assert_array_equal(rows(found, name), wanted)
    np.testing.assert_array_equal(rows(found, name, 3, 4), wanted[3:4])
    assert found.left_out == (("blk.0.ffn_down_exps.input_scale",) if scales else ())


def test_projections_that_were_joined_are_cut_apart(tmp_path: Path) -> None:
    """As `--fuse-gate-up-exps` and `--fuse-qkv` of newer converters write them, rotated rows among them."""
    original = tiny("mixtral")
    tensors = as_llama_cpp(original)
    for layer in range(2):
        gate, up = (tensors.pop(f"blk.{layer}.ffn_{which}_exps.weight") for which in ("gate", "up"))
        tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate([gate, up], axis=1)
        qkv = [tensors.pop(f"blk.{layer}.attn_{which}.weight") for which in "qkv"]
        tensors[f"blk.{layer}.attn_qkv.weight"] = np.concatenate(qkv)
    (tmp_path / "config.json").write_text(json.dumps(original.config.to_dict()))
    found = read_gguf(write_gguf(tmp_path / "model.gguf", original, tensors))
    assert found.config_from == "config.json"
    for name, tensor in original.state_dict().items():
        assert torch.equal(rows(found, name), tensor), name


def test_latent_attention_from_before_it_was_split(tmp_path: Path) -> None:
    original = tiny("deepseek_v3")
    tensors = {
        name: value for name, value in as_llama_cpp(original).items() if "_b.weight" not in name or "q_b" in name
    }
    for layer in range(2):
        weight = original.state_dict()[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
        tensors[f"blk.{layer}.attn_kv_b.weight"] = weight.numpy()

    def older(metadata: dict[str, Any]) -> None:
        for side in ("key", "value"):
            metadata[f"attention.{side}_length"] = metadata.pop(f"attention.{side}_length_mla")

    found = read_gguf(write_gguf(tmp_path / "model.gguf", original, tensors, edit=older))
    for name, tensor in original.state_dict().items():
        assert torch.equal(rows(found, name), tensor), name


def test_draft_layers_are_left_out_and_named(tmp_path: Path) -> None:
    original = tiny("glm4_moe")
    tensors = as_llama_cpp(original)
    extra = {name.replace("blk.1.", "blk.2."): value for name, value in tensors.items() if name.startswith("blk.1.")}
    extra["blk.2.nextn.eh_proj.weight"] = np.zeros((64, 128), dtype=np.float32)
    path = write_gguf(
        tmp_path / "model.gguf",
        original,
        tensors | extra,
        edit=lambda it: it.update(block_count=3, nextn_predict_layers=1),
    )
    found = read_gguf(path)
    assert (found.config.num_hidden_layers, found.config.architectures) == (2, ["Glm4MoeForCausalLM"])
    assert set(found.left_out) == set(extra)


def test_a_norm_in_blocks_is_read_whole(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    original = tiny("qwen3_moe")
    norm = original.state_dict()["model.norm.weight"].numpy()
    blocks = gguf.quants.quantize(norm, kind)
    found = read_gguf(write_gguf(tmp_path / "model.gguf", original, raw={"output_norm.weight": (blocks, kind)}))
    np.testing.assert_array_equal(rows(found, "model.norm.weight"), gguf.quants.dequantize(blocks, kind))


def test_a_tied_head_has_no_tensor(tmp_path: Path) -> None:
    original = tiny("qwen3_moe", tie_word_embeddings=True)
    tensors = {name: value for name, value in as_llama_cpp(original).items() if name != "output.weight"}
    found = read_gguf(write_gguf(tmp_path / "model.gguf", original, tensors))
    assert found.config.tie_word_embeddings
    assert "lm_head.weight" not in found.weights
    assert torch.equal(loaded(found)(TOKENS).logits, original(TOKENS).logits)


def test_an_expert_width_that_is_no_default_is_read(tmp_path: Path) -> None:
    """transformers 5.23 takes its default, 768, whatever the file says; where that changes, this test says so."""
    path = write_gguf(tmp_path / "model.gguf", tiny("qwen3_moe"))
    assert read_gguf(path).config.moe_intermediate_size == 32
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf").moe_intermediate_size == 768


def test_every_architecture_with_experts_that_both_libraries_know_is_read() -> None:
    expert = gguf.MODEL_TENSOR.FFN_DOWN_EXP
    known = {name for arch, name in gguf.MODEL_ARCH_NAMES.items() if expert in gguf.MODEL_TENSORS.get(arch, ())}
    marked = {family.model_type for family in families()}
    assert {name for name in known if marked & set(model_types(name))} == GGUF_READ
    assert {name: model_types(name)[0] for name in ("llama", "qwen35moe", "nemotron_h_moe")} == {
        "llama": "mixtral",
        "qwen35moe": "qwen3_5_moe_text",
        "nemotron_h_moe": "nemotron_h",
    }


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"config": {"moe_intermediate_size": 64}}, r"ffn_gate_exps\.weight is 8×32×64, and .*gate_up_proj would be"),
        (
            {"config": {"model_type": "olmoe"}},
            "its architecture is qwen3moe, and the config.json beside it is of a olmoe",
        ),
        ({"config": {"num_hidden_layers": 1}}, r"blk\.1\.\w+\.weight \(and 11 other tensors\) belong to no part"),
        ({"without": "blk.1.attn_norm.weight"}, r"no tensor for model\.layers\.1\.input_layernorm\.weight"),
        ({"without": "blk.0.ffn_up_exps.weight"}, r"no tensor for model\.layers\.0\.mlp\.experts\.gate_up_proj"),
        ({"more": "blk.1.attn_sinks.weight"}, r"blk\.1\.attn_sinks\.weight \(and 0 other tensors\) belong to no part"),
        ({"metadata": {"attention.head_count": None}}, r"does not say its qwen3moe\.attention\.head_count"),
        ({"metadata": {"attention.head_count": "four"}}, r"qwen3moe\.attention\.head_count is no number"),
        ({"metadata": {"attention.head_count": [4, 5]}}, r"qwen3moe\.attention\.head_count is no number"),
        ({"metadata": {"block_count": 2**31 - 1}}, r"not all of its 2147483647 layers are there"),
        ({"metadata": {"rope.freq_base": float("nan")}}, r"qwen3moe\.rope\.freq_base is no number"),
        ({"more": "rope_freqs.weight"}, r"rotary embedding is stretched lies in rope_freqs\.weight"),
    ],
)
def test_files_and_configs_that_do_not_fit_are_one_line(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    original = tiny("qwen3_moe")
    tensors = {name: value for name, value in as_llama_cpp(original).items() if name != changed.get("without")}
    if "more" in changed:
        tensors[changed["more"]] = np.zeros(4, dtype=np.float32)

    def edit(metadata: dict[str, Any]) -> None:
        for key, value in changed.get("metadata", {}).items():
            metadata.pop(key) if value is None else metadata.update({key: value})

    path = write_gguf(tmp_path / "model.gguf", original, tensors, edit=edit)
    if "config" in changed:
        (tmp_path / "config.json").write_text(json.dumps(original.config.to_dict() | changed["config"]))
    with pytest.raises(ModelError, match=words) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_say_all_asks_for_its_config(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny("qwen3_moe", num_hidden_layers=1))
    path.write_bytes(path.read_bytes().replace(b"\x08\0\0\0\0\0\0\0qwen3moe", b"\x08\0\0\0\0\0\0\0mistral4", 1))
    with pytest.raises(
        ModelError, match=r"a mistral4 file does not say all of its config; put its config\.json beside it"
    ):
        read_gguf(path)


def test_an_architecture_that_is_not_read_is_refused_with_those_that_are(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "grok")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"architecture grok are not read; .*qwen3moe"):
        read_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("family", sorted({family for name in GGUF_READ for family in model_types(name)}))
def test_key_conversions_leave_a_models_own_names_alone(family: str) -> None:
    """So that weights under these names go through the same loader as a checkpoint's."""
    with torch.device("meta"):
        model = auto_class(config := tiny_config(family)).from_config(config)
    names = model.state_dict().keys()
    assert targets(model, get_model_conversion_mapping(model), names) == {name: name for name in names}
