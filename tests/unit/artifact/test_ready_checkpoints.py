"""Merged FP8, int8, int4 and MLX checkpoints: keys, codes and scales by hand, and what their config.json says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from scripts.parity.layouts import make_adapter
from tests.unit.artifact.conftest import BASE
from toolkit.checkpoint.identity import identify_base
from toolkit.errors import DataError, ModelError, RecipeError
from toolkit.export import checkpoint_writer, export_adapter

TEXTS = [list(range(3, 40))]
DOWN, ROUTER = "model.layers.1.mlp.experts.5.down_proj", "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def plain(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The merge in floats: of a base in bf16, so each weight is off by half a rounding of that."""
    out = tmp_path_factory.mktemp("plain") / "out"
    export_adapter(pristine, BASE, "merged", out)
    return load_file(out / "model.safetensors")


def export(artifact: Path, folder: Path, format: str, quant: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    done = export_adapter(artifact, BASE, format, folder / "out", quant=quant, texts=TEXTS, force=True)
    assert 0 < done.difference <= done.bound
    assert done.survival is not None
    assert done.survival.losses is not None
    config: dict[str, Any] = json.loads((folder / "out/config.json").read_bytes())
    return load_file(folder / "out/model-00001.safetensors"), config


def test_fp8_has_a_scale_a_row_and_says_so(artifact: Path, plain: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, config = export(artifact, tmp_path, "merged-vllm", "fp8")
    codes, scale, wanted = tensors[f"{DOWN}.weight"], tensors[f"{DOWN}.weight_scale"], plain[f"{DOWN}.weight"].float()
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (wanted.shape[0], 1)
    torch.testing.assert_close(scale.float(), wanted.abs().amax(1, keepdim=True) / 448, rtol=2**-7, atol=0)
    torch.testing.assert_close(codes.float() * scale.float(), wanted, rtol=2**-4 + 2**-7, atol=2e-4)
    told = config["quantization_config"]
    (group,) = told["config_groups"].values()
    assert (told["quant_method"], told["format"], group["format"]) == (
        "compressed-tensors",
        "float-quantized",
        "float-quantized",
    )
    assert group["weights"] | {"dynamic": False} == group["weights"]
    assert group["input_activations"]["strategy"] == "token"
    routers = {f"model.layers.{number}.mlp.gate" for number in range(4)}
    assert set(told["ignore"]) == routers | {"model.embed_tokens"}
    kept = {key for key, tensor in tensors.items() if tensor.dtype == torch.bfloat16 and "scale" not in key}
    assert all(torch.equal(tensors[key], plain[key]) for key in kept)
    assert ROUTER in kept
    assert {key.removesuffix("_scale") for key in tensors} == plain.keys()


@pytest.mark.parametrize(("quant", "bits", "half"), [("int8", 8, 128), ("int4", 4, 8)])
def test_integers_lie_in_words_by_groups(
    artifact: Path, plain: dict[str, Tensor], tmp_path: Path, quant: str, bits: int, half: int
) -> None:
    tensors, config = export(artifact, tmp_path, "merged-vllm", quant)
    packed, scale = tensors[f"{DOWN}.weight_packed"], tensors[f"{DOWN}.weight_scale"].float()
    wanted = plain[f"{DOWN}.weight"].float()
    assert tensors[f"{DOWN}.weight_shape"].tolist() == list(wanted.shape)
    words = packed.long() & 0xFFFFFFFF
    codes = torch.stack([words >> shift & 2**bits - 1 for shift in range(0, 32, bits)], -1).flatten(1) - half
    assert codes.shape == wanted.shape
    values = codes * scale.repeat_interleave(128, 1)
    assert ((values - wanted).abs() <= 1.02 * scale.repeat_interleave(128, 1)).all()
    assert (values - wanted).abs().mean() < 0.3 * scale.mean()
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["strategy"]) == (bits, 128, "group")
    assert config["quantization_config"]["config_groups"]["group_0"]["input_activations"] is None


def test_mlx_has_stacks_in_bits_and_routers_in_floats(artifact: Path, plain: dict[str, Tensor], tmp_path: Path) -> None:
    tensors, config = export(artifact, tmp_path, "merged-mlx", "4bit")
    at = "model.layers.1.mlp.switch_mlp.down_proj"
    packed = tensors[f"{at}.weight"]
    assert packed.dtype == torch.uint32
    codes = torch.stack([packed[5].long() >> shift & 15 for shift in range(0, 32, 4)], -1).flatten(1)
    scale, bias = (tensors[f"{at}.{part}"][5].float().repeat_interleave(64, 1) for part in ("scales", "biases"))
    wanted = plain[f"{DOWN}.weight"].float()
    assert ((codes * scale + bias - wanted).abs() <= 1.1 * scale.abs()).all()
    assert (codes * scale + bias - wanted).abs().mean() < 0.3 * scale.abs().mean()
    assert torch.equal(tensors[ROUTER], plain[ROUTER])
    told = config["quantization"]
    assert told == config["quantization_config"]
    assert (told["bits"], told["group_size"], told["mode"]) == (4, 64, "affine")
    assert told["model.embed_tokens"] == {"bits": 8, "group_size": 64, "mode": "affine"}
    assert tensors["model.embed_tokens.weight"].shape[1] * 4 == config["hidden_size"]
    assert (config["num_experts"], config["rope_theta"], config["torch_dtype"]) == (8, 10000.0, "bfloat16")


@pytest.mark.parametrize(("layout", "quant"), [("merged-vllm", "int8"), ("merged-mlx", "8bit")])
def test_a_base_in_several_files_becomes_several_files_of_our_own(
    write: Callable[..., Path], layout: str, quant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = tmp_path / BASE.name
    AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(base, max_shard_size="1MB")
    artifact = write(tmp_path / "adapter", base=identify_base(str(base)))
    monkeypatch.setattr(checkpoint_writer, "_SHARD", 1 << 20)
    done = export_adapter(artifact, base, layout, tmp_path / "out", quant=quant)
    assert 0 < done.difference <= done.bound
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_bytes())
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    assert len(files) > 1


def test_types_are_asked_for_by_name(artifact: Path, tmp_path: Path) -> None:
    for layout, quant, error, why in (
        ("merged-vllm", None, RecipeError, "wants a type; give --quant one of fp8, int8, int4"),
        ("merged-mlx", "fp8", RecipeError, "--quant fp8: no such type; give --quant one of 4bit, 8bit"),
        ("merged-mlx", "4bit", DataError, "with --data FILE"),
    ):
        with pytest.raises(error, match=why):
            export_adapter(artifact, BASE, layout, tmp_path / "out", quant=quant)
    with pytest.raises(RecipeError, match="takes no --base-gguf"):
        export_adapter(artifact, BASE, "merged-mlx", tmp_path / "out", quant="8bit", base_gguf=BASE)


@pytest.mark.parametrize(
    ("family", "format", "quant", "changed", "why"),
    [
        ("gpt_oss", "merged-vllm", "fp8", {}, "in one tensor, .*, and vLLM 0.33 loads them in floats, .*: export as m"),
        ("granitemoe", "merged-vllm", "int4", {}, "in one tensor, .*, and vLLM 0.33 wants .*: export as merged"),
        ("jamba", "merged-mlx", "8bit", {}, "jamba is none of the families that mlx-lm was seen to compute alike"),
        (
            "qwen2_moe",
            "merged-mlx",
            "8bit",
            {"norm_topk_prob": True},
            "norm_topk_prob is True in this model, and mlx-lm",
        ),
    ],
)
def test_what_no_program_would_compute_is_refused(
    family: str, format: str, quant: str, changed: dict[str, Any], why: str, tmp_path: Path
) -> None:
    _, artifact = make_adapter(family, tmp_path, **changed)
    with pytest.raises(ModelError, match=why) as caught:
        export_adapter(artifact, tmp_path / "base", format, tmp_path / "out", quant=quant, texts=TEXTS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
