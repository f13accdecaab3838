"""Int8 storage of expert stacks and linears, and loading a checkpoint into it."""

from toolkit.quant.experts import ExpertStack, ExpertWeights, expert_weights
from toolkit.quant.int8 import Int8Linear, dequantize, quantize
from toolkit.quant.load import Coverage, dequantize_state, load_int8, measure
from toolkit.quant.quantizer import LINEAR_ROLES, Int8Config

__all__ = [
    "LINEAR_ROLES",
    "Coverage",
    "ExpertStack",
    "ExpertWeights",
    "Int8Config",
    "Int8Linear",
    "dequantize",
    "dequantize_state",
    "expert_weights",
    "load_int8",
    "measure",
    "quantize",
]
