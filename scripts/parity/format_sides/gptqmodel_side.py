"""What GPTQModel stores: its own quantiser's scales, its packing, its conversion to the first format. Run by
format_writers.py.

Most variants pack weights that are rounded to nearest: which codes a calibration chooses is no part of the format. The
variants `real-…` let the package load, calibrate on random tokens and save a whole model.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own count on two cores is one, which it then refuses
from gptqmodel import GPTQModel
from gptqmodel.nn_modules.qlinear.fp8 import TorchFP8Linear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import FP8Config, QuantizeConfig
from gptqmodel.quantization.quantizer import Quantizer
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
from gptqmodel.version import __version__
from safetensors.torch import load_file
from tiny import MAIN, Source, Variant, Written, run
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

GATE, DOWN = "model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.mlp.experts.1.down_proj"


def _write(source: Source, *, shuffled: bool = False, no_index: bool = False, **how: Any) -> Written:
    config = QuantizeConfig(offload_to_disk=False, **how)
    config.meta_set_versionable(key="quantizer", value=[f"gptqmodel:{__version__}"])
    tensors, expected = {}, {}
    for number, (name, weight) in enumerate(source.linears.items()):
        if source.family is None:  # rows whose true zero points are the least and the greatest code
            weight = torch.cat((weight[:1].abs(), -weight[1:2].abs(), weight[2:3].abs(), weight[3:]))
        own = config.dynamic_get(name)
        if own is False:
            tensors[f"{name}.weight"] = weight.half()
            continue
        chosen = copy.deepcopy(config)
        for key, value in (own or {}).items():
            setattr(chosen, key, value)
        module, expected[f"{name}.weight"] = _packed(weight, chosen, number if shuffled else None)
        stored = {key: value for key, value in module.state_dict().items() if not (no_index and key == "g_idx")}
        tensors |= {f"{name}.{key}": value for key, value in stored.items()}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        file = json.loads((Path(folder) / "quantize_config.json").read_text())
    files = {"quantize_config.json": file} if source.family or config.dynamic else {}
    return Written(tensors, expected, file, files=files)


def _packed(weight: torch.Tensor, config: QuantizeConfig, seed: int | None) -> tuple[nn.Module, torch.Tensor]:
    """The module as it is stored, and its values [outputs, inputs] as the package dequantises them, in fp32."""
    outputs, inputs = weight.shape
    size = config.group_size if config.group_size > 0 else inputs
    index = torch.arange(inputs) // size
    if seed is not None:
        index = index[torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))]
    scales, zeros = [], []
    for group in range(int(index.max()) + 1):
        quantizer = Quantizer(config)
        quantizer.configure(perchannel=True)
        quantizer.find_params(weight[:, index == group], weight=True)
        scales.append(quantizer.scale.reshape(outputs).half().float())
        zeros.append(quantizer.zero.reshape(outputs))
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight = nn.Parameter(weight)
    module = TorchLinear(
        bits=config.bits,
        group_size=config.group_size,
        sym=config.sym,
        desc_act=config.desc_act,
        in_features=inputs,
        out_features=outputs,
        format=config.format,
    )
    module.pack_original(linear, torch.stack(scales, 1), torch.stack(zeros, 1), index.int())
    values = _values(copy.deepcopy(module))
    if config.format == "gptq":
        convert_gptq_v2_to_v1_format_module(module, config)
    return module, values


def _values(module: TorchLinear) -> torch.Tensor:
    """[outputs, inputs]; the scales are made fp32, so that the package computes in fp32. Zero points are true here."""
    module._init_wf_unsqueeze_buffers()
    module.register_buffer("scales", module.scales.float())
    return module.eval().dequantize_weight().T.contiguous()


def _fp8(source: Source, **how: Any) -> Written:
    """Its FP8, whose `weight_scale_inv` it divides by, under the name and method that others multiply by."""
    config = FP8Config(offload_to_disk=False, **how)
    tensors, expected = {}, {}
    for name, weight in source.linears.items():
        linear = nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight = nn.Parameter(weight)
        sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
        module = TorchFP8Linear(
            bits=8, group_size=-1, sym=True, desc_act=False, **sizes, **config.quant_linear_init_kwargs()
        )
        module.pack_original(linear, None, None)
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        expected[f"{name}.weight"] = module.dequantize_weight(dtype=torch.float32).T.contiguous()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        file = json.loads((Path(folder) / "quantize_config.json").read_text())
    return Written(tensors, expected, file)


def _real(source: Source, **how: Any) -> Written:
    """Load, calibrate, save: names, config and tensors are all the package's."""
    config = QuantizeConfig(bits=4, group_size=32, format="gptq", offload_to_disk=False, device="cpu", **how)
    with tempfile.TemporaryDirectory() as scratch:
        before, after = Path(scratch) / "plain", Path(scratch) / "quantised"
        before.mkdir()
        tiny.save_plain(before, source)
        words = Tokenizer(models.WordLevel({f"w{word}": word for word in range(101)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(before)
        model = GPTQModel.load(str(before), config)
        torch.manual_seed(3)
        rows = torch.randint(3, 100, (64, 64)).tolist()
        model.quantize([{"input_ids": row, "attention_mask": [1] * 64} for row in rows], batch_size=8)
        model.save(str(after))
        tensors = load_file(after / "model.safetensors")
        more = json.loads((after / "config.json").read_text())
        files = {"quantize_config.json": json.loads((after / "quantize_config.json").read_text())}
    written = more.pop("quantization_config")
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    expected = {f"{name}.weight": _values(_stored(tensors, name, config)) for name in names}
    return Written(tensors, expected, written, files=files, more=more, whole=True)


def _stored(tensors: dict[str, torch.Tensor], name: str, config: QuantizeConfig) -> TorchLinear:
    """The package's layer of one module's parts, in the form that it computes with."""
    parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    outputs = parts["qweight"].shape[1]
    bits = parts["qzeros"].shape[1] * 32 // outputs
    sizes = {"in_features": len(parts["g_idx"]), "out_features": outputs, "group_size": config.group_size}
    module = TorchLinear(bits=bits, sym=config.sym, desc_act=config.desc_act, format=config.format, **sizes)
    for part, value in parts.items():
        module.register_buffer(part, value.clone())
    convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    return module


def _variants() -> dict[str, Variant]:
    found = {}
    shapes = {GATE: (12, 96), DOWN: (4, 32)}
    for form, widths in (("gptq", (2, 3, 4, 5, 6, 7, 8)), ("gptq_v2", (3, 4, 5)), ("gptq_p", (3, 4, 5))):
        for bits in widths:
            for sym in (True, False):
                name = f"{'gptq_v1' if form == 'gptq' else form}-{bits}{'' if sym else '-asym'}".removeprefix("gptq_")
                planar = bits in {3, 5, 6, 7}
                golden = None if sym or (form, bits) in {("gptq_p", 4), ("gptq_v2", 5)} else shapes
                families = MAIN if sym and form == "gptq" and bits in {4, 8} else ("qwen3_moe",)
                write = partial(
                    _write, bits=bits, group_size=16 if planar else 32, sym=sym, format=form, desc_act=False
                )
                found[name] = Variant(write, families, {GATE: (32, 32)} if golden and planar else golden)
    whole = partial(_write, bits=4, group_size=-1, sym=True, format="gptq", desc_act=False)
    found["v1-4-channel"] = Variant(whole, golden=shapes)
    ragged = partial(_write, bits=4, group_size=32, sym=False, format="gptq", desc_act=False)
    found["v1-4-asym-ragged"] = Variant(ragged, families=(), golden={GATE: (12, 80)}, note="a last group of 16")
    for sym in (True, False):
        shuffled = partial(_write, bits=4, group_size=32, sym=sym, format="gptq", desc_act=True, shuffled=True)
        found[f"v1-4{'' if sym else '-asym'}-desc-act"] = Variant(shuffled, golden=None if sym else shapes)
    none = partial(_write, bits=4, group_size=32, sym=True, format="gptq", desc_act=False, no_index=True)
    found["v1-4-no-g-idx"] = Variant(none, golden=None, note="as GPTQModel, without g_idx, as others write it")
    rules = {
        r"-:.*experts\.3\.": {},
        r".*down_proj": {"bits": 8, "group_size": 16},
        r".*layers\.1\..*up_proj": {"sym": False},
        r"+:.*self_attn.*": {"bits": 8},
        r".*": {"bits": 4},
    }
    dynamic = partial(_write, bits=4, group_size=32, sym=True, format="gptq", desc_act=False, dynamic=rules)
    found["dynamic"] = Variant(dynamic, golden=shapes)
    for name, how in (("row", {}), ("block", {"weight_scale_method": "block", "weight_block_size": [16, 16]})):
        found[f"fp8-{name}"] = Variant(partial(_fp8, **how), MAIN, {GATE: (16, 64)})
    for name, how, families in (
        ("real-4", {"desc_act": False, "sym": True}, ("qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss")),
        ("real-4-asym-desc-act", {"desc_act": True, "act_group_aware": False, "sym": False}, ("qwen3_moe",)),
        ("real-dynamic", {"desc_act": False, "sym": True, "dynamic": rules}, ("qwen3_moe",)),
    ):
        found[name] = Variant(partial(_real, **how), families, None, apart=False)
    return found


if __name__ == "__main__":
    run("GPTQModel", _variants(), ("transformers",))
