"""What compressed-tensors stores: its own scales, its own compressors, its own decompression. Run by format_writers.py.

Works with 0.20.1, and with 0.17.1 for what only the older one writes: `weight_g_idx`, and odd widths with whole values
in every word.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from tiny import DOWN, GATE, GOLDEN, MAIN, Source, Variant, Written, renamed, run, tree
from torch import nn

__all__ = ["decompressed"]

IGNORE = ["lm_head", r"re:.*\.(gate|router)$"]
ALL = (*MAIN, "gpt_oss")
LARGER = {GATE: (20, 48), DOWN: (12, 16)}
"""0.20.1 cannot unpack zero points of 4 bits that fill one word, that is, of eight outputs or fewer."""


def _write(
    source: Source,
    groups: Mapping[str, Any],
    *,
    ignore: tuple[str, ...] = (),
    dtype: torch.dtype = torch.bfloat16,
    shuffled: bool = False,
) -> Written:
    """Quantise every linear by its group's scheme; the config is read back from the file that the package updates."""
    model = _tree(source, dtype)
    config = QuantizationConfig(config_groups=dict(groups), ignore=[*IGNORE, *ignore])
    apply_quantization_config(model, config)
    chosen = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    for number, module in enumerate(chosen.values()):
        _scales(module, number if shuffled else None)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    tensors, expected = {}, {}
    for name, module in chosen.items():
        stored = {key: tensor.detach() for key, tensor in module.state_dict().items()}
        tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
        expected[f"{name}.weight"] = decompressed(stored, module.quantization_scheme)
    for name, weight in source.linears.items():
        if name not in chosen:
            tensors[f"{name}.weight"] = weight.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        compressor.update_config(folder)
        written = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    return Written(tensors, expected, written)


def _tree(source: Source, dtype: torch.dtype) -> nn.Module:
    def linear(name: str, weight: torch.Tensor) -> nn.Linear:
        made = nn.Linear(*reversed(weight.shape), bias=False)
        made.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        return made

    return tree(source, linear)


def _scales(module: nn.Module, seed: int | None) -> None:
    """Scales and zero points by the package's own arithmetic from the least and largest value of each group."""
    args = module.quantization_scheme.weights
    weight = module.weight.detach()
    group = args.group_size
    if seed is not None:  # columns in an order of their own, as GPTQ's activation order leaves them
        groups = torch.arange(weight.shape[1]) // group
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))
        module.register_parameter("weight_g_idx", nn.Parameter(groups[order].int(), requires_grad=False))
        weight = weight[:, torch.argsort(groups[order], stable=True)]
    if args.strategy == QuantizationStrategy.BLOCK:
        rows, columns = args.block_structure
        pieces = [[_range(piece) for piece in row.split(columns, 1)] for row in weight.split(rows)]
        least, most = (torch.stack([torch.stack([pair[k] for pair in row]) for row in pieces]) for k in (0, 1))
    elif args.strategy == QuantizationStrategy.TENSOR:
        least, most = (value.reshape(1) for value in _range(weight))
    else:
        cut = weight.unflatten(1, (-1, group)) if group and group > 0 else weight.unsqueeze(1)
        least, most = cut.amin(-1), cut.amax(-1)
    whole = generate_gparam(*_range(weight)) if args.strategy == QuantizationStrategy.TENSOR_GROUP else None
    scale, zero = calculate_qparams(least, most, args, global_scale=whole)
    found = {"weight_scale": scale, "weight_zero_point": zero, "weight_global_scale": whole}
    found |= {"input_scale": torch.tensor([0.5]), "input_global_scale": torch.tensor([128.0])}
    for name, value in found.items():
        if (place := getattr(module, name, None)) is not None:
            place.data = value.reshape(place.shape).to(place.dtype)


def _range(piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return piece.min(), piece.max()


def decompressed(stored: Mapping[str, torch.Tensor], scheme: Any) -> torch.Tensor:
    """The package's decompression with the stored scales given as fp32, so that it computes in fp32."""
    if "weight_packed" in stored and stored["weight_packed"].dtype == torch.uint8 and scheme.weights.num_bits == 4:
        return _fp4_values(stored, scheme)
    wide = dict(stored)
    if wide["weight_scale"].is_floating_point():
        wide["weight_scale"] = wide["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(wide, scheme)["weight"].float()


def _fp4_values(stored: Mapping[str, torch.Tensor], scheme: Any) -> torch.Tensor:
    """As the FP4 decompressors, whose own type is bf16, in fp32."""
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    packed = stored["weight_packed"]
    codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
    scale = compressor._decompress_scale(stored["weight_scale"], torch.float32)
    whole = stored.get("weight_global_scale")
    return dequantize(x_q=codes, scale=scale, args=scheme.weights, global_scale=whole, dtype=torch.float32)


def _scheme(bits: int, *, activations: Mapping[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    targets = weights.pop("targets", ["Linear"])
    more = {key: weights.pop(key) for key in ("format",) if key in weights}
    return {
        "group_0": {
            "targets": targets,
            "weights": {"num_bits": bits, "dynamic": False, **weights},
            "input_activations": activations,
            **more,
        }
    }


def _preset(name: str) -> dict[str, Any]:
    return {"group_0": preset_name_to_scheme(name, ["Linear"])}


def _variant(groups: Mapping[str, Any], **more: Any) -> Variant:
    own = {key: more.pop(key) for key in ("ignore", "dtype", "shuffled") if key in more}
    return Variant(partial(_write, groups=groups, **own), **more)


def _of_today() -> dict[str, Variant]:
    by_group = {"strategy": "group", "group_size": 16, "type": "int"}
    token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    token_float = {**token, "type": "float"}
    found: dict[str, Variant] = {}
    for bits in range(2, 9):
        for symmetric in (True, False):
            shown = f"int{bits}{'' if symmetric else '-asym'}-group"
            families = ALL if bits == 4 else ("qwen3_moe",)
            shapes = LARGER if bits == 4 else None if symmetric else GOLDEN
            found[shown] = _variant(_scheme(bits, symmetric=symmetric, **by_group), families=families, golden=shapes)
    for strategy in ("channel", "tensor"):
        for symmetric in (True, False):
            scheme = _scheme(4, symmetric=symmetric, strategy=strategy, type="int")
            found[f"int4{'' if symmetric else '-asym'}-{strategy}"] = _variant(
                scheme, golden=None if symmetric and strategy == "channel" else LARGER
            )
    found["int8-channel"] = _variant(_scheme(8, symmetric=True, strategy="channel", type="int"), families=ALL)
    found["int4-group-fp16"] = _variant(_scheme(4, symmetric=True, **by_group), dtype=torch.float16, golden=None)
    scheme = _scheme(4, symmetric=False, **by_group)
    found["int4-asym-group-fp32"] = _variant(scheme, dtype=torch.float32, golden=LARGER)
    for name, symmetric in (("w8a8", True), ("w8a8-asym", False)):
        scheme = _scheme(8, symmetric=symmetric, strategy="channel", type="int", activations=token)
        found[name] = _variant(scheme, families=ALL if symmetric else ("qwen3_moe",))
    found["w4a8-int-quantized"] = _variant(_scheme(4, symmetric=True, activations=token, **by_group))
    found["fp8-channel"] = _variant(_preset("FP8_DYNAMIC"), families=ALL)
    found["fp8-tensor"] = _variant(_preset("FP8"), families=ALL)
    for name, block, shapes in (
        ("fp8-block", [16, 16], GOLDEN),
        ("fp8-block-ragged", [12, 24], {GATE: (20, 40), DOWN: (6, 20)}),
    ):
        scheme = _scheme(8, type="float", strategy="block", block_structure=block, activations=token_float)
        found[name] = _variant(scheme, golden=shapes, families=ALL if name == "fp8-block" else ("qwen3_moe",))
    found["fp8-group"] = _variant(_scheme(8, **{**by_group, "type": "float"}, activations=token_float))
    found["fp8-channel-weights-only"] = _variant(
        _scheme(8, type="float", strategy="channel"), note="without activations the format is naive-quantized"
    )
    for name, preset, families in (
        ("nvfp4a16", "NVFP4A16", ALL),
        ("nvfp4", "NVFP4", ALL),
        ("mxfp4", "MXFP4A16", ALL),
        ("mxfp8", "MXFP8", ALL),
        ("mxfp6", "MXFP6A16", ("qwen3_moe",)),
    ):
        found[name] = _variant(_preset(preset), families=families, golden=None if name == "nvfp4a16" else GOLDEN)
    found["mixed"] = _variant(_mixed(token_float))
    found["mixed-bits"] = _variant(_mixed_bits(), families=("qwen3_moe", "deepseek_v2"), golden=None)
    found["regex-order"] = _variant(
        _regex_order(), note="of two patterns that fit, the package takes the first by text, not by group"
    )
    found["one-expert-ignored"] = _variant(
        _scheme(4, symmetric=True, **by_group), ignore=(r"re:.*experts\.1\.(gate|up|down)_proj$",)
    )
    found["fp8-one-expert-ignored"] = _variant(
        _preset("FP8_DYNAMIC"), ignore=(r"re:.*experts\.1\.(gate|up|down)_proj$",), golden=None
    )
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

    def write_renamed(source: Source) -> Written:
        return _write(renamed(source, names), _scheme(4, symmetric=True, **by_group))

    found["int4-group-other-names"] = Variant(write_renamed, families=("mixtral",), golden=None)
    return found


def _mixed(token: Mapping[str, Any]) -> dict[str, Any]:
    """FP8 attention, experts by projection: int4 gate, asymmetric int8 up, NVFP4 down; the first hit counts."""
    fp8 = _scheme(8, type="float", strategy="channel", activations=token, targets=[r"re:.*self_attn\..*"])
    gate = _scheme(4, type="int", strategy="group", group_size=32, symmetric=True, targets=[r"re:.*gate_proj$"])
    up = _scheme(8, type="int", strategy="channel", symmetric=False, targets=[r"re:.*up_proj$"])
    down = {"targets": ["Linear"], "weights": preset_name_to_scheme("NVFP4A16", ["Linear"]).weights}
    return {f"group_{n}": g for n, g in enumerate((fp8["group_0"], gate["group_0"], up["group_0"], down))}


def _mixed_bits() -> dict[str, Any]:
    """Bits that differ by layer, by expert and by projection, all of one format."""
    found = {}
    for number, (bits, target) in enumerate(
        (
            (8, r"re:.*layers\.0\..*experts\.0\.gate_proj$"),
            (6, "re:.*down_proj"),
            (3, r"re:.*experts\.2\."),
            (4, "Linear"),
        )
    ):
        scheme = _scheme(bits, type="int", strategy="group", group_size=16, symmetric=True, targets=[target])
        found[f"group_{number}"] = scheme["group_0"]
    return found


def _regex_order() -> dict[str, Any]:
    """The second group's pattern comes first in the alphabet: its modules get 4 bits."""
    same = {"type": "int", "strategy": "group", "group_size": 16, "symmetric": True}
    experts = _scheme(8, targets=[r"re:.*experts\..*"], **same)
    down = _scheme(4, targets=["re:.*down_proj$"], **same)
    return {"group_0": experts["group_0"], "group_1": down["group_0"]}


def _of_before() -> dict[str, Variant]:
    by_group = {"strategy": "group", "group_size": 16, "type": "int"}
    found = {}
    for bits in (3, 5, 6, 7):
        found[f"old-int{bits}-group"] = _variant(_scheme(bits, symmetric=True, **by_group), golden=None)
        asymmetric = _scheme(bits, symmetric=False, **by_group)
        found[f"old-int{bits}-asym-group"] = _variant(asymmetric, golden=None if bits == 6 else GOLDEN)
    for symmetric in (True, False):
        scheme = _scheme(4, symmetric=symmetric, actorder="group", **by_group)
        found[f"old-int4{'' if symmetric else '-asym'}-g-idx"] = _variant(scheme, shuffled=True)
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run("compressed-tensors", _of_today() if version("compressed-tensors") >= "0.18" else _of_before())
    sys.exit()
