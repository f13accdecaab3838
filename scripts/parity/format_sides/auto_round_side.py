"""What AutoRound exports from a transformers model, rounded to nearest without data. Run by format_writers.py.

A golden case is one module of such an export.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
from auto_round import AutoRound
from auto_round.experimental.qmodules.mx import MXFP4QuantLinear, MXFP8QuantLinear
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import load_file
from tiny import GATE, MAIN, Source, Variant, Written, run
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

RAW = ("auto_round", "auto_round:gptqmodel")
"""Packings that store a zero point as it is; `auto_gptq` stores one less."""


def _write(source: Source, form: str, **how: Any) -> Written:
    family = source.family or "qwen3_moe"
    with tempfile.TemporaryDirectory() as scratch:
        before, after = Path(scratch) / "plain", Path(scratch) / "quantised"
        before.mkdir()
        tiny.save_plain(before, source if source.family else tiny.whole_source(family))
        model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.bfloat16)
        words = Tokenizer(models.WordLevel({f"w{word}": word for word in range(101)}, unk_token="w0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")
        AutoRound(model, tokenizer=tokenizer, iters=0, disable_opt_rtn=True, **how).quantize_and_save(after, form)
        folder = next(after.rglob("model.safetensors")).parent
        tensors = load_file(folder / "model.safetensors")
        more = json.loads((folder / "config.json").read_text())
        files = {"quantization_config.json": json.loads((folder / "quantization_config.json").read_text())}
    config = more.pop("quantization_config")
    expected = _values(tensors, config)
    if source.family is None:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(GATE)}
        expected, more, files = {f"{GATE}.weight": expected[f"{GATE}.weight"]}, {}, {}
    return Written(tensors, expected, config, files=files, more=more, whole=True)


def _values(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """By the package's own layers; scales of integers are given as fp32, so that it computes in fp32."""
    found = {}
    for key, tensor in tensors.items():
        name = key.removesuffix(".qweight")
        scale = tensors.get(f"{key}_scale", tensors.get(f"{key.removesuffix('_packed')}_scale"))
        if name != key:
            parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
            found[f"{name}.weight"] = _integers(parts, config)
        elif key.endswith((".weight", ".weight_packed")) and scale is not None:
            kind = MXFP4QuantLinear if key.endswith("_packed") else MXFP8QuantLinear
            shape = (tensor.shape[1] * (2 if key.endswith("_packed") else 1), tensor.shape[0])
            layer = kind(*shape, config=None, weight=tensor, weight_scale=scale, dtype=torch.float32)
            found[f"{key.removesuffix('_packed')}"] = layer.dequant_weight_online().float()
    return found


def _integers(parts: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> torch.Tensor:
    weight, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"].float()
    packing = config.get("packing_format", f"auto_round:auto_{config['quant_method']}")
    if packing.endswith("awq"):
        return dequantize_gemm(weight, zeros, scales, 4, weight.shape[0] // scales.shape[0]).T.contiguous()
    outputs = weight.shape[1]
    bits = zeros.shape[1] * 32 // outputs
    inputs = weight.shape[0] * 32 // bits
    side = qlinear_torch if packing in RAW else qlinear_torch_zp
    layer: nn.Module = side.QuantLinear(bits, inputs // scales.shape[0], inputs, outputs, bias=False)
    layer.qweight, layer.qzeros, layer.scales = weight, zeros, scales
    layer.post_init()
    return layer(torch.eye(inputs)).T.contiguous()


def _variants() -> dict[str, Variant]:
    case = {GATE: (tiny.WIDTH, tiny.HIDDEN)}
    ours = ("qwen3_moe",)
    mixed = {r".*down_proj": {"bits": 8}, r".*self_attn.*": {"bits": 16}}
    rows: dict[str, tuple[str, dict[str, Any], tuple[str, ...], Any]] = {
        "4": ("auto_round", {}, (*MAIN, "gpt_oss"), None),
        "2": ("auto_round", {"bits": 2}, ours, None),
        "3": ("auto_round", {"bits": 3}, ours, None),
        "8": ("auto_round", {"bits": 8}, ours, None),
        "4-asym": ("auto_round", {"sym": False}, ours, None),
        "2-asym": ("auto_round", {"bits": 2, "sym": False}, ours, None),
        "3-asym": ("auto_round", {"bits": 3, "sym": False}, ours, None),
        "6-asym": ("auto_round", {"bits": 6, "sym": False}, ours, case),
        "gptqmodel-4-asym": ("auto_round:gptqmodel", {"sym": False}, ours, None),
        "auto-gptq-4": ("auto_gptq", {}, ours, None),
        "auto-gptq-4-asym": ("auto_gptq", {"sym": False}, ours, case),
        "auto-awq-4": ("auto_awq", {}, ours, None),
        "auto-awq-4-asym": ("auto_awq", {"sym": False}, ours, None),
        "mixed": ("auto_round", {"layer_config": mixed}, ours, None),
    }
    found = {}
    for name, (form, how, families, golden) in rows.items():
        write = partial(_write, form=form, **{"group_size": 32, **how})
        found[name] = Variant(write, families, golden, apart=False)
    for scheme in ("MXFP4", "MXFP8"):
        write = partial(_write, form="auto_round", scheme=scheme)
        found[scheme.lower()] = Variant(write, ours, None, apart=False)
    return found


if __name__ == "__main__":
    run("auto-round", _variants(), ("transformers",))
