"""Every way weights are stored becomes the same int8, one expert at a time; what cannot is refused in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, modeling_utils
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from toolkit.errors import ModelError
from toolkit.quant import load_int8, quantize_checkpoint, rounding

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 12,
    "num_local_experts": 12,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
LATENT: dict[str, Any] = {
    **SIZES,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "index_n_heads": 2,
    "index_head_dim": 16,
}
BLOCK = 20
"""Divides nothing in the models above, so that weights end in cut-off blocks, as in published FP8 checkpoints."""

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])

Tensors = dict[str, torch.Tensor]


def tiny(folder: Path, family: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A random checkpoint in the layout its family is published in."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def rewrite(folder: Path, out: Path, tensors: Tensors, quantization: dict[str, Any] | None, shards: int = 1) -> Path:
    """Another checkpoint with the same config."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    out.mkdir()
    (out / "config.json").write_text(
        json.dumps(config if quantization is None else {**config, "quantization_config": quantization})
    )
    files = ["model.safetensors"] if shards == 1 else [f"part-{n}.safetensors" for n in range(shards)]
    # By turns, so that a weight and its scales, and the experts of one stack, lie in different files.
    weight_map = {key: files[number % shards] for number, key in enumerate(tensors)}
    for file in files:
        part = {key: value.contiguous() for key, value in tensors.items() if weight_map[key] == file}
        save_file(part, out / file, {"format": "pt"})
    if shards > 1:
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def fp8(weight: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, a scale for each block, and exactly what both say together."""
    shape = [-(-size // BLOCK) * BLOCK for size in weight.shape]
    whole = torch.zeros(shape)
    whole[: weight.shape[0], : weight.shape[1]] = weight
    blocks = whole.view(shape[0] // BLOCK, BLOCK, shape[1] // BLOCK, BLOCK)
    scale = (blocks.abs().amax((1, 3)) / 448).to(scale_dtype)
    values = (blocks / scale.float()[:, None, :, None]).reshape(shape).to(torch.float8_e4m3fn)
    exact = values.float() * scale.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    rows, columns = weight.shape
    return values[:rows, :columns], scale, exact[:rows, :columns]


def same(first: Path, second: Path, **arguments: Any) -> None:
    """Both load to the same bits."""
    ours, theirs = (load_int8(str(folder), **arguments)[0].state_dict() for folder in (first, second))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == theirs[name].dtype, name


def fp8_pair(tmp_path: Path, family: str, shards: int = 1) -> tuple[Path, Path, dict[str, Any]]:
    """A checkpoint of FP8 blocks, one of their exact values in fp32, and what the first declares."""
    folder = tiny(tmp_path / "float", family, **LATENT if "deepseek" in family else {})
    stored: Tensors = {}
    exact: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".layers." in name and "proj" in name:
            stored[name], stored[f"{name}_scale_inv"], exact[name] = fp8(weight, torch.float32)
        else:
            stored[name] = exact[name] = weight
    declared = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    quantized = rewrite(folder, tmp_path / "fp8", stored, declared, shards)
    return quantized, rewrite(folder, tmp_path / "exact", exact, None), declared


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "deepseek_v32"])
def test_fp8_blocks_round_as_their_exact_values(tmp_path: Path, family: str, shards: int) -> None:
    quantized, exact, declared = fp8_pair(tmp_path, family, shards)
    same(quantized, exact)
    model, coverage = load_int8(str(quantized))
    assert coverage.stacks_int8 == coverage.stacks > 0
    assert coverage.linears_8bit == coverage.linears > 0
    assert model.config.quantization_config.quant_method == "onecard_int8"
    assert model.config.quantization_config.source == declared


def test_fused_fp8_stacks_round_as_their_exact_values(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "float", "qwen3_moe")
    stacks = load_int8(str(folder), experts="none", linears="none")[0].state_dict()
    stored: Tensors = {}
    exact: Tensors = {}
    for name, weight in stacks.items():
        if ".experts." in name:
            parts = [fp8(expert, torch.float32) for expert in weight]
            stored[name], stored[f"{name}_scale_inv"], exact[name] = (
                torch.stack(part) for part in zip(*parts, strict=True)
            )
        else:
            stored[name] = exact[name] = weight
    declared = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    same(rewrite(folder, tmp_path / "fp8", stored, declared), rewrite(folder, tmp_path / "exact", exact, None))


@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_mxfp8_blocks_round_as_their_exact_values(tmp_path: Path, family: str, scale_dtype: torch.dtype) -> None:
    folder = tiny(tmp_path / "float", family, **LATENT if "deepseek" in family else {})
    declared = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    theirs = Fp8Quantize(AutoHfQuantizer.from_config(AutoQuantizationConfig.from_dict(declared), pre_quantized=True))
    stored: Tensors = {}
    exact: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        made = theirs.convert({name: weight}) if ".layers." in name and "proj" in name else {name: weight}
        stored |= made  # a weight whose rows are no whole blocks stays as it is
        scale = made.get(f"{name}_scale_inv")
        exact[name] = weight if scale is None else made[name].float() * scale.float().repeat_interleave(32, -1)
        if scale is not None:
            stored[f"{name}_scale_inv"] = scale.view(scale_dtype)
    assert {weight.dtype for weight in stored.values()} == {torch.float32, torch.float8_e4m3fn, scale_dtype}
    quantized = rewrite(folder, tmp_path / "mxfp8", stored, declared, shards=2)
    same(quantized, rewrite(folder, tmp_path / "exact", exact, None))
    assert load_int8(str(quantized))[0].config.quantization_config.source == declared


def mxfp4_pair(tmp_path: Path, shards: int = 1) -> tuple[Path, Path, dict[str, Any]]:
    """A checkpoint of MXFP4 stacks, one of their exact values in fp32, and what the first declares."""
    folder = tiny(tmp_path / "float", "gpt_oss")
    generator = torch.Generator().manual_seed(3)
    stored: Tensors = {}
    exact: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = exact[name] = weight
            continue
        experts, inputs, outputs = weight.shape
        codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 126, codes.shape[:3], generator=generator, dtype=torch.uint8)
        stored[f"{name}_blocks"] = codes[..., 0::2] | (codes[..., 1::2] << 4)
        stored[f"{name}_scales"] = scales
        values = FP4[codes.long()] * torch.exp2(scales.float() - 127)[..., None]
        exact[name] = values.flatten(2).transpose(1, 2)
    declared = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    quantized = rewrite(folder, tmp_path / "mxfp4", stored, declared, shards)
    return quantized, rewrite(folder, tmp_path / "exact", exact, None), declared


@pytest.mark.parametrize("shards", [1, 3])
def test_mxfp4_blocks_round_as_their_exact_values(tmp_path: Path, shards: int) -> None:
    quantized, exact, declared = mxfp4_pair(tmp_path, shards)
    same(quantized, exact)
    assert load_int8(str(quantized))[0].config.quantization_config.source == declared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_half_precision_is_rounded_as_it_is_and_not_after_a_cast(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    half = tiny(tmp_path / "half", family, dtype)
    wide = {name: tensor.float() for name, tensor in load_file(half / "model.safetensors").items()}
    single = rewrite(half, tmp_path / "single", wide, None)
    for compute in (torch.float32, torch.bfloat16):
        same(half, single, dtype=compute)


class LargestFloat(TorchDispatchMode):
    """Records the largest floating tensor that any operation of this thread makes outside meta."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                is_view = any(isinstance(arg, torch.Tensor) and arg._is_view() for arg in args) or tensor._is_view()
                self.numel = max(self.numel, 0 if is_view else tensor.numel())
        return result


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_no_stack_exists_as_floats_while_it_loads(tmp_path: Path, family: str) -> None:
    folder = tiny(tmp_path / "model", family, torch.bfloat16, num_experts=32, num_local_experts=32)
    with LargestFloat() as largest:
        load_int8(str(folder))
    expert = 2 * SIZES["moe_intermediate_size"] * SIZES["hidden_size"]
    assert expert <= largest.numel <= 4 * expert


@pytest.mark.parametrize("method", ["sesame", "aqlm", None])
def test_unknown_formats_are_refused_by_name(tmp_path: Path, method: str | None) -> None:
    folder = tiny(tmp_path / "float", "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    foreign = rewrite(folder, tmp_path / "foreign", tensors, {"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=rf"quantised as {method or 'something'}.*take the unquantised") as caught:
        load_int8(str(foreign))
    assert "\n" not in str(caught.value)


def _shorten(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][:-1]


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
ATTENTION = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tensors: tensors.pop(EXPERT), "lacks model.layers.1.mlp.experts.gate_up_proj"),
        (lambda tensors: _shorten(tensors, ATTENTION), ATTENTION),
        (lambda tensors: _shorten(tensors, "model.norm.weight"), "wrong shape for model.norm.weight .63, not 64"),
        (lambda tensors: tensors.pop(ATTENTION), f"lacks {ATTENTION}"),
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks model.norm.weight"),
    ],
)
def test_a_tensor_that_is_missing_or_misshapen_is_named(
    tmp_path: Path, spoil: Callable[[Tensors], object], words: str
) -> None:
    folder = tiny(tmp_path / "float", "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    with pytest.raises(ModelError, match=words) as caught:
        load_int8(str(rewrite(folder, tmp_path / "spoilt", tensors, None)))
    assert "\n" not in str(caught.value)


def test_experts_of_the_wrong_size_are_named(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "float", "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "layers.0" in name and "down_proj" in name:
            _shorten(tensors, name)
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.experts.down_proj, or has it in another shape") as caught:
        load_int8(str(rewrite(folder, tmp_path / "spoilt", tensors, None)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (MemoryError("4 GiB"), MemoryError, "4 GiB"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "CUDA out of memory"),
        (ArithmeticError("too much"), ModelError, r"float: model.layers.0.mlp.experts.down_proj: too much"),
    ],
)
def test_what_fails_while_rounding_is_told_and_ends_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception], words: str
) -> None:
    """transformers goes on with the next tensor, and says in the end that there were some issues."""
    folder, calls = tiny(tmp_path / "float", "qwen3_moe"), []

    def fail(*_: object, name: str = "", **__: object) -> None:
        calls.append(name)
        raise error

    monkeypatch.setattr(rounding.Workspace, "round", fail)
    for read in (load_int8, lambda path: quantize_checkpoint(path, tmp_path / "out")):
        calls.clear()
        with pytest.raises(expected, match=words) as caught:
            read(str(folder))
        assert "\n" not in str(caught.value)
        assert len(calls) == 1


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "float", "qwen3_moe")
    _truncate(folder)
    with pytest.raises(ModelError) as caught:
        load_int8(str(folder))
    assert "\n" not in str(caught.value)


def test_a_card_is_asked_for_no_weight_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes room for all that it will load; what our rounding has reserved by then is not part of it."""
    folder, counted = tiny(tmp_path / "source", "qwen3_moe"), {}
    expand = modeling_utils.expand_device_map

    def count(model: Any, device_map: dict[str, Any], quantizer: Any) -> None:
        on_card = dict.fromkeys(expand({"": 0}, list(model.state_dict())), torch.device("cuda", 0))
        counted["bytes"] = modeling_utils.get_total_byte_count(model, on_card, quantizer)[torch.device("cuda", 0)]

    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", count)
    model, _ = load_int8(str(folder))
    floats = sum(p.nbytes for n, p in model.state_dict().items() if p.is_floating_point() and not n.endswith("_scale"))
    assert counted["bytes"] == floats
    model.save_pretrained(tmp_path / "int8")
    load_int8(str(tmp_path / "int8"))
    assert counted["bytes"] == sum(p.nbytes for p in model.state_dict().values())  # nothing of it is reserved before


def test_the_head_is_given_last_tokens_in_one_piece(tmp_path: Path) -> None:
    model, _ = load_int8(str(tiny(tmp_path / "model", "mixtral")), dtype=torch.bfloat16)
    seen: list[bool] = []
    model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    ids = torch.arange(3, 15).view(3, 4)
    with torch.no_grad():
        last = model(input_ids=ids, logits_to_keep=1).logits
        whole = model(input_ids=ids).logits
    assert seen == [True, True], "torch copies the head's weight for each sequence of a slice"
    torch.testing.assert_close(last, whole[:, -1:], rtol=0.02, atol=0.02)
