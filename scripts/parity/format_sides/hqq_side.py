"""What HQQ stores: its own linears' state, encoded for safetensors. Run by format_writers.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from tiny import GATE, MAIN, Source, Variant, Written, run
from torch import nn
from transformers import HqqConfig


def _write(source: Source, bits: float, axis: int, group: int | None = 16, *, as_float: bool = False) -> Written:
    how: dict[str, Any] = {"nbits": bits, "group_size": group, "axis": axis, "view_as_float": as_float}
    tensors, expected = {}, {}
    for name, weight in source.linears.items():
        linear = nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight.data = weight.bfloat16()
        module = HQQLinear(linear, BaseQuantizeConfig(**how), compute_dtype=torch.bfloat16, device="cpu")
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        wide = {**module.meta, "compute_dtype": torch.float32}
        wide |= {key: module.meta[key].float() for key in ("scale", "zero")}
        expected[f"{name}.weight"] = Quantizer.dequantize(module.W_q.data, wide)
    config = HqqConfig(**how, skip_modules=["lm_head", "gate"])
    return Written(tensors, expected, config.to_dict())


def _variants() -> dict[str, Variant]:
    found = {}
    for bits in (8, 6, 5, 4, 3, 2, 1.58, 1):
        for axis in (1, 0):
            families = MAIN if (bits, axis) == (4, 1) else ("qwen3_moe",)
            shown = (bits, axis) in {(8, 1), (4, 1), (4, 0), (3, 1), (3, 0), (2, 1), (1, 1)}
            golden = {GATE: (16, 32) if bits == 1 else (12, 48)} if shown else None
            found[f"{bits}-axis-{axis}"] = Variant(partial(_write, bits=bits, axis=axis), families, golden)
    found["4-axis-1-rows"] = Variant(partial(_write, bits=4, axis=1, group=None), golden={GATE: (12, 48)})
    found["4-axis-1-as-float"] = Variant(partial(_write, bits=4, axis=1, as_float=True), golden=None)
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run("hqq", _variants(), ("transformers",))
