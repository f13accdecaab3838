"""What NVIDIA ModelOpt exports from a transformers model, on a CPU. Run by format_writers.py.

A golden case is one module of a smaller model's export. `int4` alone is packed module by module: 0.47.0 cannot export
4-bit integers from a model whose experts are fused.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import tiny
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import from_quantized_weight, get_weight_scaling_factor, to_quantized_weight
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import load_file
from tiny import GATE, MAIN, Source, Variant, Written, run
from torch import nn
from transformers import AutoModelForCausalLM

FP8 = {"num_bits": (4, 3), "axis": None}
NVFP4 = {"num_bits": (2, 1), "axis": None, "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
OFF = [{"quantizer_name": "*", "enable": False}]


def _rules(**quantizers: Mapping[str, Any]) -> dict[str, Any]:
    """A config of a few patterns; the words of a name are joined by stars."""
    rules = [{"quantizer_name": f"*{name.replace('__', '*')}*", "cfg": cfg} for name, cfg in quantizers.items()]
    return {"quant_cfg": [*OFF, *rules], "algorithm": "max"}


MIXED = _rules(
    self_attn__weight_quantizer=FP8,
    self_attn__input_quantizer=FP8,
    experts__weight_quantizer=NVFP4,
    experts__input_quantizer=NVFP4,
)
BLOCKS = _rules(
    self_attn__weight_quantizer={**FP8, "block_sizes": {-1: 16, -2: 16}},
    experts__weight_quantizer={**FP8, "block_sizes": {-1: 16, -2: 16}},
)


def _write(source: Source, config: Mapping[str, Any] | str) -> Written:
    family = source.family or "qwen3_moe"
    with tempfile.TemporaryDirectory() as scratch:
        before, after = Path(scratch) / "plain", Path(scratch) / "quantised"
        before.mkdir()
        tiny.save_plain(before, source if source.family else tiny.whole_source(family))
        model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.bfloat16)
        if isinstance(config, str):
            rules = [rule for name in config.split("+") for rule in getattr(mtq, name)["quant_cfg"]]
            config = {**getattr(mtq, config.split("+")[0]), "quant_cfg": rules}
        torch.manual_seed(3)
        tokens = torch.randint(3, 100, (4, 32))
        mtq.quantize(model, dict(config), lambda quantised: quantised(tokens))
        export_hf_checkpoint(model, export_dir=str(after))
        tensors = load_file(after / "model.safetensors")
        files = {"hf_quant_config.json": json.loads((after / "hf_quant_config.json").read_text())}
        more = json.loads((after / "config.json").read_text())
    expected = _values(tensors)
    written = more.pop("quantization_config", None)
    if source.family is None:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(GATE)}
        expected, more = {f"{GATE}.weight": expected[f"{GATE}.weight"]}, {}
    return Written(tensors, expected, written, files=files, more=more, whole=True)


def _values(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The package's own tensors' dequantisation, in fp32, of every weight that has a scale."""
    found = {}
    for key, scale in tensors.items():
        if not key.endswith("weight_scale"):
            continue
        second = tensors.get(f"{key}_2")
        if key.endswith("_weight_scale"):  # a fused stack [experts, inputs, outputs], packed along the inputs
            name = key.removesuffix("_weight_scale")
            turned = scale.transpose(1, 2) if scale.dim() == 3 else scale
            found[name] = _value(tensors[name].transpose(1, 2), turned, second).transpose(1, 2)
            continue
        name = key.removesuffix("_scale")
        found[name] = _value(tensors[name], scale, second)
        if (before := tensors.get(f"{name.removesuffix('weight')}pre_quant_scale")) is not None:
            found[name] *= before.float()  # the layer multiplies its inputs by it
    return found


def _value(weight: torch.Tensor, scale: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    """One weight [outputs, inputs], or a stack of them."""
    shape, how = weight.shape, {"scale": scale}
    halves = torch.Size((*shape[:-1], 2 * shape[-1]))
    if weight.dtype == torch.int8:
        return from_quantized_weight(weight, scale, "int8_wo", torch.float32)
    if second is not None:
        how |= {"double_scale": second, "block_sizes": {-1: halves[-1] // scale.shape[-1]}}
        return NVFP4QTensor(halves, torch.float32, weight).dequantize(torch.float32, **how).float()
    if weight.dtype == torch.uint8:
        return MXFP4QTensor(halves, torch.float32, weight).dequantize(torch.float32, **how, block_sizes={-1: 32})
    if scale.dtype == torch.uint8:
        return MXFP8QTensor(shape, torch.float32, weight).dequantize(torch.float32, **how)
    if scale.dim() == 1:
        how["scale"] = scale[:, None]
    elif scale.dim() > 1:
        blocks = scale.reshape(scale.shape[0], -1)
        sizes = (whole // parts for whole, parts in zip(shape, blocks.shape, strict=True))
        how = {"scale": blocks, "block_sizes": dict(zip((0, 1), sizes, strict=True))}
    return FP8QTensor(shape, torch.float32, weight).dequantize(torch.float32, **how)


def _int4(source: Source) -> Written:
    tensors, expected = {}, {}
    rules = _rules(weight_quantizer={"num_bits": 4, "axis": None, "block_sizes": {-1: 16}})
    for name, weight in source.linears.items():
        linear = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False))
        linear[0].weight.data = weight
        mtq.quantize(linear, rules, lambda quantised, width=weight.shape[1]: quantised(torch.ones(1, width)))
        scale = get_weight_scaling_factor(linear[0])
        tensors[f"{name}.weight"] = to_quantized_weight(weight, scale, "int4_awq", block_size=16)
        tensors[f"{name}.weight_scale"] = scale
        expected[f"{name}.weight"] = linear[0].weight_quantizer(weight)
    return Written(tensors, expected, None)


def _variants() -> dict[str, Variant]:
    all_families = (*MAIN, "gpt_oss")
    case = {GATE: (tiny.WIDTH, tiny.HIDDEN)}
    found = {}
    for name, config, families, golden in (
        ("fp8", "FP8_DEFAULT_CFG", all_families, case),
        ("fp8-and-cache", "FP8_DEFAULT_CFG+FP8_KV_CFG", ("qwen3_moe", "deepseek_v2"), None),
        ("fp8-per-channel", "FP8_PER_CHANNEL_PER_TOKEN_CFG", ("qwen3_moe",), case),
        ("fp8-block", BLOCKS, ("qwen3_moe",), case),
        ("nvfp4", "NVFP4_DEFAULT_CFG", all_families, case),
        ("nvfp4-mlp-only", "NVFP4_MLP_ONLY_CFG", ("qwen3_moe",), None),
        ("w4a16-nvfp4", "W4A16_NVFP4_CFG", ("qwen3_moe",), None),
        ("w4a8-nvfp4-fp8", "W4A8_NVFP4_FP8_CFG", ("qwen3_moe",), case),
        ("mxfp8", "MXFP8_DEFAULT_CFG", ("qwen3_moe",), None),
        ("mxfp4", "MXFP4_DEFAULT_CFG", ("qwen3_moe",), None),
        ("int8", "INT8_WEIGHT_ONLY_CFG", ("qwen3_moe",), None),
        ("int8-smoothquant", "INT8_SMOOTHQUANT_CFG", ("qwen3_moe",), None),
        ("mixed", MIXED, ("qwen3_moe",), None),
    ):
        found[name] = Variant(partial(_write, config=config), families, golden, apart=False)
    found["int4"] = Variant(_int4, families=(), golden={GATE: (12, 48)}, note="values by its fake quantiser")
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    run("nvidia-modelopt", _variants(), ("transformers",))
