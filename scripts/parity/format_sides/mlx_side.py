"""What mlx-lm writes: its own loader, quantiser and writer, on a Linux CPU. Run by format_writers.py."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import DOWN, MAIN, Source, Variant, Written, run, save_plain

STACK = "model.layers.0.mlp.switch_mlp.gate_proj"
FAMILIES = (*MAIN, "gpt_oss")
_QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
Predicate = Callable[[str, Any], bool | dict[str, Any]]


def _write(source: Source, predicate: Predicate | None = None, **how: Any) -> Written:
    with tempfile.TemporaryDirectory() as scratch:
        before, after = Path(scratch) / "plain", Path(scratch) / "quantised"
        if source.family is None:
            model, config = _modules(source), {}
        else:
            before.mkdir()
            save_plain(before, _stacked(source) if source.family == "gpt_oss" else source)
            model, config = load_model(before, lazy=True)
            model.update(tree_map(lambda value: value.astype(mx.bfloat16), model.parameters()))
        model, config = quantize_model(model, config, quant_predicate=predicate, **how)
        save_model(after, model)
        save_config(config, after / "config.json")
        tensors = load_file(after / "model.safetensors")
        with safe_open(after / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        config = json.loads((after / "config.json").read_text())
    more = {key: value for key, value in config.items() if key != "quantization_config"}
    if source.family is None:
        more = {"quantization": more["quantization"]}
    return Written(
        tensors,
        _values(model, split=source.family is not None),
        config["quantization_config"],
        metadata=metadata,
        more=more,
        whole=True,
    )


def _stacked(source: Source) -> Source:
    """gpt-oss in mlx-lm's own layout: its loader takes the published fused experts in MXFP4 alone."""
    others = {}
    for name, tensor in source.others.items():
        at, _, kind = name.rpartition(".")
        if not at.endswith(".experts"):
            others[name] = tensor
            continue
        what = "bias" if kind.endswith("_bias") else "weight"
        rows = tensor if what == "bias" else tensor.transpose(1, 2)
        if kind.startswith("gate_up"):
            others |= {f"{at}.gate_proj.{what}": rows[:, ::2], f"{at}.up_proj.{what}": rows[:, 1::2]}
        else:
            others[f"{at}.down_proj.{what}"] = rows
    return Source(source.linears, source.left, others, source.family)


def _modules(source: Source) -> nn.Module:
    """Only these modules; a weight of three dimensions is a stack of experts."""
    root = nn.Module()
    for name, weight in source.linears.items():
        *path, last = name.split(".")
        at: Any = root
        for word, following in zip(path, [*path[1:], last], strict=True):
            made: Any = [] if following.isdigit() else nn.Module()
            if isinstance(at, list):
                while len(at) <= int(word):
                    at.append(nn.Module())
                at = at[int(word)]
            else:
                if word not in at:
                    at[word] = made
                at = at[word]
        stack = weight.dim() == 3
        module = (
            SwitchLinear(weight.shape[2], weight.shape[1], weight.shape[0], bias=False)
            if stack
            else nn.Linear(*reversed(weight.shape), bias=False)
        )
        module.weight = mx.array(weight.numpy()).astype(mx.bfloat16)
        at[last] = module
    return root


def _values(model: nn.Module, split: bool) -> dict[str, torch.Tensor]:
    """Dequantised by mlx with the scales in fp32; stacks expert by expert where `split`, else as they are."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, _QUANTISED):
            continue
        scales, biases = module.scales, module.get("biases")
        whole = module.get("global_scale")
        how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        if module.mode == "affine":
            value = mx.dequantize(module.weight, scales.astype(mx.float32), biases.astype(mx.float32), **how)
        elif whole is None:
            value = mx.dequantize(module.weight, scales, dtype=mx.float32, **how)
        else:
            pieces = zip(module.weight, scales, whole, strict=True)
            value = mx.stack([mx.dequantize(w, s, global_scale=g, dtype=mx.float32, **how) for w, s, g in pieces])
        plain = torch.from_numpy(np.array(value.astype(mx.float32)))
        if split and plain.dim() == 3:
            at, _, projection = name.rpartition(".")
            at = at.removesuffix(".switch_mlp").removesuffix(".experts")
            found |= {f"{at}.experts.{expert}.{projection}.weight": part for expert, part in enumerate(plain)}
        else:
            found[f"{name}.weight"] = plain
    return found


def _routers_plain(path: str, module: Any) -> bool:
    return not path.endswith((".gate", ".router"))


def _by_module(path: str, module: Any) -> bool | dict[str, Any]:
    """Bits by projection and layer, another mode for attention, the last layer's up projection in float."""
    if path.endswith("down_proj"):
        return {"group_size": 32, "bits": 6, "mode": "affine"}
    if "self_attn" in path:
        return {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    return not path.endswith("layers.1.mlp.switch_mlp.up_proj")


def _variants() -> dict[str, Variant]:
    shapes: Mapping[str, tuple[int, ...]] = {STACK: (3, 5, 64), DOWN: (7, 32)}
    found = {}
    for bits in (1, 2, 3, 4, 5, 6, 8):
        families = FAMILIES if bits == 4 else ("qwen3_moe",)
        write = partial(_write, group_size=32, bits=bits)
        found[f"affine-{bits}"] = Variant(write, families=families, golden=None if bits == 5 else shapes, apart=False)
    for mode in ("mxfp4", "mxfp8", "nvfp4"):
        write = partial(_write, group_size=None, bits=None, mode=mode)
        families = FAMILIES if mode != "mxfp8" else ("qwen3_moe",)
        found[mode] = Variant(write, families=families, golden=shapes, apart=False)
    write = partial(_write, group_size=None, bits=None, mode="nvfp4", global_scale=True)
    found["nvfp4-global-scale"] = Variant(write, families=("qwen3_moe", "mixtral"), golden={STACK: (3, 5, 64)})
    write = partial(_write, group_size=64, bits=4)
    found["affine-4-group-64"] = Variant(
        write, golden=None, note="down projections are 32 wide and stay float without a word"
    )
    write = partial(_write, group_size=32, bits=4, predicate=_routers_plain)
    found["affine-4-plain-routers"] = Variant(write, families=MAIN, golden=None)
    found["by-module"] = Variant(partial(_write, group_size=32, bits=4, predicate=_by_module), golden=shapes)
    return found


if __name__ == "__main__":
    run("mlx", _variants(), ("mlx-lm",))
