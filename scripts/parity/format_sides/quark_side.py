"""What Quark exports: linears in FP8, int8 and MXFP4, each by the package's own quantiser. Run by format_writers.py.

Quark quantises linears alone, and experts are no linears in transformers 5. So a model is a tree of linears here, under
the names that files written with transformers 4 have.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quark.torch import ModelQuantizer, export_safetensors
from quark.torch.quantization.config import config as specs
from safetensors.torch import load_file
from tiny import GATE, MAIN, Source, Variant, Written, run, tree
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_ROW = {"symmetric": True, "scale_type": "float", "round_method": "half_even", "ch_axis": 0, "is_dynamic": False}
_SPECS: dict[str, Callable[[], Any]] = {
    "fp8": lambda: specs.FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=False),
    "fp8-channel": lambda: specs.FP8E4M3PerChannelSpec(is_dynamic=False, ch_axis=0),
    "int8-channel": lambda: specs.Int8PerChannelSpec(**_ROW),
    "mxfp4": lambda: specs.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False),
}


class _Linears(PreTrainedModel):
    """Linears under their names, each run once by a forward, so that the package sees them."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig, root: nn.Module) -> None:
        super().__init__(config)
        for name, child in root.named_children():
            self.add_module(name, child)
        self.kept = nn.Parameter(torch.zeros(1))  # the export asks a parameter for its dtype
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: they have their values."""

    def forward(self, rows: torch.Tensor) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module(rows.new_ones(1, module.in_features))


def _write(source: Source, kind: str) -> Written:
    def linear(name: str, weight: torch.Tensor) -> nn.Module:
        made = nn.Linear(*reversed(weight.shape), bias=False)
        made.weight.data = weight
        return made

    model = _Linears(PretrainedConfig(), tree(Source(source.linears, {}, {}), linear)).eval()
    config = specs.QConfig(global_quant_config=specs.QLayerConfig(weight=_SPECS[kind]().to_quantization_spec()))
    quantizer = ModelQuantizer(config)
    model = quantizer.freeze(quantizer.quantize_model(model, [torch.ones(1, 1)]))
    expected = {f"{name}.weight": model.get_submodule(name).weight.detach().clone() for name in source.linears}
    with tempfile.TemporaryDirectory() as folder:
        export_safetensors(model, folder)
        tensors = load_file(next(Path(folder).glob("*.safetensors")))
        del tensors["kept"]
        written = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    return Written(tensors, expected, written)


def _variants() -> dict[str, Variant]:
    case = {GATE: (12, 64)}
    return {
        kind: Variant(partial(_write, kind=kind), MAIN if kind in ("fp8", "mxfp4") else ("qwen3_moe",), case)
        for kind in _SPECS
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    run("amd-quark", _variants(), ("transformers",))
