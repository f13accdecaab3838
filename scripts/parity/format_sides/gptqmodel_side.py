"""What GPTQModel stores: its own quantiser's scales, its packing, its conversion to the first format. Run by
format_writers.py.

Rounds to nearest: which codes a calibration would choose is no part of the format.
"""

from __future__ import annotations

import copy
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.quantization.quantizer import Quantizer
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from gptqmodel.version import __version__
from tiny import MAIN, Source, Variant, Written, run
from torch import nn

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
    module._init_wf_unsqueeze_buffers()
    wide = copy.deepcopy(module)
    wide.register_buffer("scales", wide.scales.float())
    values = wide.eval().dequantize_weight().T.contiguous()
    if config.format == "gptq":
        convert_gptq_v2_to_v1_format_module(module, config)
    return module, values


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
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run("GPTQModel", _variants(), ("transformers",))
