"""Int8 storage of expert stacks and linears, loading a checkpoint into it, and writing one."""

from toolkit.quant.digits import Digits, can_multiply, multiply, multiply_each
from toolkit.quant.experts import ExpertStack, ExpertWeights, expert_weights
from toolkit.quant.int8 import Int8Linear, dequantize, quantize
from toolkit.quant.load import Coverage, dequantize_state, load_int8, measure
from toolkit.quant.quantizer import Int8Config
from toolkit.quant.save import WrittenCheckpoint, fetch, quantize_checkpoint, refuse_existing

__all__ = [
    "Coverage",
    "Digits",
    "ExpertStack",
    "ExpertWeights",
    "Int8Config",
    "Int8Linear",
    "WrittenCheckpoint",
    "can_multiply",
    "dequantize",
    "dequantize_state",
    "expert_weights",
    "fetch",
    "load_int8",
    "measure",
    "multiply",
    "multiply_each",
    "quantize",
    "quantize_checkpoint",
    "refuse_existing",
]
