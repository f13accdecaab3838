"""What AutoAWQ stores: its quantiser's scales and its three layouts. Run by format_writers.py.

The package dequantises on a CPU in the layout `gemm` alone. The other two take the same codes, scales and zero points
in another order, so their values are those of `gemm`; only `gemv_fast` rounds −zero·scale to fp16 and adds that.
"""

from __future__ import annotations

from functools import partial

import torch
from awq.models._config import AwqConfig
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.packing_utils import dequantize_gemm, reverse_awq_order, unpack_awq
from tiny import GATE, MAIN, Source, Variant, Written, run
from torch import nn

_LAYOUTS = {"gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast}


def _write(source: Source, version: str, group: int) -> Written:
    quantizer = object.__new__(AwqQuantizer)  # its constructor wants a model and calibration data
    quantizer.group_size, quantizer.w_bit, quantizer.zero_point = group, 4, True
    tensors, expected = {}, {}
    for name, weight in source.linears.items():
        linear = nn.Linear(*reversed(weight.shape), bias=False).half()
        linear.weight.data, scales, zeros = quantizer.pseudo_quantize_tensor(weight.half())
        how = {"linear": linear, "w_bit": 4, "group_size": group}
        module = gemm = WQLinear_GEMM.from_linear(**how, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
        values = dequantize_gemm(gemm.qweight, gemm.qzeros, gemm.scales.float(), 4, group)
        if version != "gemm":
            module = _LAYOUTS[version].from_linear(**how, scales=scales, zeros=zeros)
        if version == "gemv_fast":
            codes, _ = reverse_awq_order(*unpack_awq(gemm.qweight, gemm.qzeros, 4), 4)
            groups = torch.arange(weight.shape[1]) // group
            values = (codes & 15) * module.scales.float()[groups] + module.qzeros.float()[groups]
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        expected[f"{name}.weight"] = values.T.contiguous()
    config = AwqConfig(q_group_size=group, w_bit=4, version=version, modules_to_not_convert=["gate"])
    return Written(tensors, expected, config.to_transformers_dict())


def _variants() -> dict[str, Variant]:
    wide = {GATE: (32, 64)}
    ours = ("qwen3_moe",)
    return {
        "gemm": Variant(partial(_write, version="gemm", group=32), MAIN, wide),
        "gemm-group-16": Variant(partial(_write, version="gemm", group=16), ours, None),
        "gemv": Variant(partial(_write, version="gemv", group=32), ours, wide),
        "gemv-fast": Variant(partial(_write, version="gemv_fast", group=32), (), wide),
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run("autoawq", _variants(), ("transformers",))
