"""transformers' quantizer seam: expert stacks and linears turn int8 one by one as the checkpoint streams in.

bitsandbytes' own quantizer replaces `nn.Linear` only and leaves the experts, nearly all of an MoE, in 16 bit. This
one declares int8 parameters on the meta skeleton and hands transformers' loader an operation that rounds each tensor
when it arrives; fusing per-expert keys stays transformers' business (`conversion_mapping`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import Bnb8bitQuantize, replace_with_bnb_linear
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from toolkit.architecture import describe, is_experts
from toolkit.quant.int8 import Int8Linear, quantize

__all__ = ["LINEAR_ROLES", "METHOD", "Int8Config", "Int8Quantizer"]

METHOD = "onecard_int8"
LINEAR_ROLES = ("attention", "shared", "dense")
"""Linears that are stored in 8 bit; heads, routers and gates keep their dtype."""


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):  # type: ignore[misc]
    """What to store in 8 bit: `experts` int8 or none, `linears` int8, bnb or none."""

    def __init__(self, experts: str = "int8", linears: str = "int8", **kwargs: Any) -> None:
        super().__init__(quant_method=METHOD)
        self.experts = experts
        self.linears = linears


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):  # type: ignore[misc]
    """Declares the int8 parameters before weights load and rounds each as it arrives."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond torch is needed."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        architecture = describe(model)
        if self.quantization_config.experts == "int8":
            for layer in architecture.layers:
                _declare_stacks(model.get_submodule(layer.name), (layer.up, layer.down))
        names = architecture.linear_names(*LINEAR_ROLES)
        if self.quantization_config.linears == "int8":
            for name in names:
                if type(linear := model.get_submodule(name)) is nn.Linear:
                    model.set_submodule(name, Int8Linear.from_linear(linear))
        elif self.quantization_config.linears == "bnb":
            keep = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in names]
            replace_with_bnb_linear(model, keep, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0))
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether transformers' loader must hand this parameter to the rounding operation."""
        module_name, _, name = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        return bool(hasattr(module, f"{name}_scale") or (type(module).__name__ == "Linear8bitLt" and name == "weight"))

    def get_quantize_ops(self) -> ConversionOps:
        """The operation applied to each such parameter."""
        return _Round(self)

    def is_serializable(self) -> bool:
        """Saving the int8 model is not this quantizer's job; adapters are saved instead."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of the frozen weights train."""
        return True


class _Round(ConversionOps):  # type: ignore[misc]
    """{name: float tensor} to {name: int8, name_scale: fp32}, or to bitsandbytes' parameter."""

    def __init__(self, quantizer: Int8Quantizer) -> None:
        self.bnb = Bnb8bitQuantize(quantizer)

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: nn.Module, **kwargs: Any) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = {}
        for full_name, value in input_dict.items():
            module_name, _, name = full_name.rpartition(".")
            module = model.get_submodule(module_name)
            if not hasattr(module, f"{name}_scale"):
                result |= self.bnb.convert({full_name: value}, model=model, **kwargs)
                continue
            tensor = value[0] if isinstance(value, list) else value
            if tensor.shape != getattr(module, name).shape:
                result[full_name] = tensor  # transformers reports the mismatch by name
                continue
            result[full_name], result[f"{full_name}_scale"] = quantize(tensor, _input_dim(module))
        return result


def _declare_stacks(experts: nn.Module, names: tuple[str, ...]) -> None:
    outputs = 2 if experts.is_transposed else 1
    for name in names:
        stack = getattr(experts, name)
        stored = torch.empty(stack.shape, dtype=torch.int8, device=stack.device)
        scale = torch.empty((stack.shape[0], stack.shape[outputs]), device=stack.device)
        setattr(experts, name, nn.Parameter(stored, requires_grad=False))
        setattr(experts, f"{name}_scale", nn.Parameter(scale, requires_grad=False))


def _input_dim(module: nn.Module) -> int:
    return -2 if is_experts(module) and module.is_transposed else -1
