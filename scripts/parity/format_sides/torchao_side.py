"""What torchao stores: whole models as transformers saves them, experts fused, and single linears for the golden cases.
Run by format_writers.py.

4-bit integers are missing: torchao 0.18 makes them on a card alone. `intx4` holds 4-bit values one a byte.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
import torchao.quantization as ao
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import GATE, MAIN, Source, Variant, Written, run, tree
from torch import nn
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization.quant_primitives import MappingType
from transformers import AutoModelForCausalLM, TorchAoConfig

EXPERTS, ATTENTION = r"re:.*experts\.(gate_up|down)_proj", r"re:.*self_attn\.\w*proj\w*\.weight"


def _write(source: Source, make: Callable[[], Any]) -> Written:
    if source.family is None:
        return _linears(source, make())
    rules = ao.FqnToConfig({EXPERTS: make(), ATTENTION: make()})
    with tempfile.TemporaryDirectory() as scratch:
        before, after = Path(scratch) / "plain", Path(scratch) / "quantised"
        before.mkdir()
        tiny.save_plain(before, source)
        config = TorchAoConfig(quant_type=rules)
        model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.bfloat16, quantization_config=config)
        model.save_pretrained(after)
        tensors = load_file(after / "model.safetensors")
        with safe_open(after / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        more = json.loads((after / "config.json").read_text())
    written = more.pop("quantization_config")
    expected = {_in_file(name, tensors): value for name, value in _values(model.state_dict()).items()}
    return Written(tensors, expected, written, metadata=metadata, more=more, whole=True)


def _in_file(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """transformers gives the parts of Mixtral's experts the published name, and leaves its own in the metadata."""
    at, _, last = name.rpartition(".")
    return name if f"{at}._{last}_qdata" in tensors else name.replace(".mlp.", ".block_sparse_moe.")


def _linears(source: Source, how: Any) -> Written:
    def linear(name: str, weight: torch.Tensor) -> nn.Module:
        made = nn.Linear(*reversed(weight.shape), bias=False).bfloat16()
        made.weight.data = weight.bfloat16()
        return made

    model = tree(source, linear)
    ao.quantize_(model, how)
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    values = _values(model.state_dict())
    dtype = str(next(iter(values.values())).dtype).removeprefix("torch.")
    return Written(tensors, values, TorchAoConfig(quant_type=how).to_dict(), dtype, metadata)


def _values(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dequantised by the tensors' own method, in fp32 where it lets one choose."""
    chosen = {name: tensor for name, tensor in state.items() if hasattr(tensor, "qdata")}
    narrow = ao.IntxUnpackedToInt8Tensor
    return {
        name: tensor.dequantize() if isinstance(tensor, narrow) else tensor.dequantize(torch.float32)
        for name, tensor in chosen.items()
    }


def _intx(bits: int) -> Any:
    return ao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=ao.PerGroup(16),
        mapping_type=MappingType.ASYMMETRIC,
    )


def _variants() -> dict[str, Variant]:
    ours, everyone = ("qwen3_moe",), (*MAIN, "gpt_oss")
    rows: dict[str, tuple[Callable[[], Any], tuple[str, ...], Any]] = {
        "int8": (ao.Int8WeightOnlyConfig, everyone, {GATE: (12, 64)}),
        "int8-group": (lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16)), ours, {GATE: (12, 64)}),
        "float8": (ao.Float8WeightOnlyConfig, everyone, {GATE: (12, 64)}),
        "intx4-asym-group": (partial(_intx, 4), (), {GATE: (12, 64)}),
        "mxfp8": (MXDynamicActivationMXWeightConfig, (), {GATE: (20, 64)}),
        "nvfp4": (NVFP4WeightOnlyConfig, (), {GATE: (16, 64)}),
    }
    return {
        name: Variant(partial(_write, make=make), families, golden, apart=False)
        for name, (make, families, golden) in rows.items()
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    run("torchao", _variants(), ("transformers",))
