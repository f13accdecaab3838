"""The other side of `format_table.py`: loads a quantised checkpoint with stock transformers and writes its logits.

    python format_stock_side.py FOLDER TOKENS OUT.safetensors

TOKENS is a JSON list of token ids. Runs in the environment of a package that knows the format, without onecard.
Asks to have weights multiplied out where transformers knows how to be asked.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

__all__ = ["main"]

MULTIPLIED_OUT: dict[str, tuple[str, dict[str, Any]]] = {
    "compressed-tensors": ("CompressedTensorsConfig", {"run_compressed": False}),
    "fp8": ("FineGrainedFP8Config", {"dequantize": True}),
    "mxfp4": ("Mxfp4Config", {"dequantize": True}),
}
"""By `quant_method`: the class and the arguments that ask for plain weights."""


@torch.no_grad()
def main(folder: str, tokens: str, out: str) -> None:
    """Load in fp32 on the CPU, run once, save `logits` [T, V]."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    declared = json.loads((Path(folder) / "config.json").read_text()).get("quantization_config") or {}
    how: dict[str, Any] = {}
    if (wanted := MULTIPLIED_OUT.get(str(declared.get("quant_method")))) is not None:
        how["quantization_config"] = getattr(transformers, wanted[0])(**wanted[1])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    logits = model(torch.tensor([json.loads(tokens)])).logits[0].float()
    save_file({"logits": logits.contiguous()}, out, {"transformers": transformers.__version__})


if __name__ == "__main__":
    main(*sys.argv[1:4])
