"""Loading a checkpoint into int8, and writing one; `gptq/` is error compensation."""

from toolkit.quant.load import Coverage, dequantize_state, load_int8, measure
from toolkit.quant.quantizer import Int8Config, register
from toolkit.quant.save import WrittenCheckpoint, quantize_checkpoint, refuse_existing

__all__ = [
    "Coverage",
    "Int8Config",
    "WrittenCheckpoint",
    "dequantize_state",
    "load_int8",
    "measure",
    "quantize_checkpoint",
    "refuse_existing",
    "register",
]
