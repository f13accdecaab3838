"""Whole models as LLM Compressor takes them apart, quantises and saves them, without data. Run by format_writers.py.

The tensors are compressed-tensors' own; what differs is the names and the config of a real checkpoint.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors_side import decompressed
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from tiny import MAIN, Source, Variant, Written, run, tree
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

IGNORE = ["lm_head", r"re:.*\.(gate|router)$"]


def _write(source: Source, data: bool = False, **scheme: Any) -> Written:
    with tempfile.TemporaryDirectory() as scratch:
        before, after = Path(scratch) / "plain", Path(scratch) / "quantised"
        before.mkdir()
        tiny.save_plain(before, source)
        words = Tokenizer(models.WordLevel({f"w{word}": word for word in range(101)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(before)
        model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.bfloat16)
        rows = {"input_ids": torch.randint(3, 100, (8, 16), generator=torch.Generator().manual_seed(3)).tolist()}
        data = {"dataset": Dataset.from_dict(rows), "num_calibration_samples": 8, "max_seq_length": 16} if data else {}
        oneshot(model=model, recipe=QuantizationModifier(ignore=IGNORE, **scheme), output_dir=str(after), **data)
        tensors = load_file(after / "model.safetensors")
        more = json.loads((after / "config.json").read_text())
    written = more.pop("quantization_config")
    return Written(tensors, _values(tensors, written), written, more=more, whole=True)


def _values(tensors: dict[str, torch.Tensor], written: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Each linear's scheme as compressed-tensors finds it in the written config, and its values by that."""
    names = [key.removesuffix("_scale").removesuffix(".weight") for key in tensors if key.endswith("weight_scale")]
    linears = {name: torch.zeros(1, 1) for name in names}
    model = tree(Source(linears, {}, {}), lambda name, weight: nn.Linear(1, 1, bias=False))
    config = QuantizationConfig(**{**written, "quantization_status": "initialized"})
    config.ignore = [*IGNORE]
    found = {}
    for name, scheme in _schemes(model, config).items():
        stored = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        stored.pop("bias", None)
        found[f"{name}.weight"] = decompressed(stored, scheme)
    return found


def _schemes(model: nn.Module, config: QuantizationConfig) -> dict[str, Any]:
    """The sizes of the model do not matter to the matching, only its names and classes."""
    for scheme in config.config_groups.values():
        scheme.input_activations = None
    sizes = nn.Linear(256, 256, bias=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = sizes.weight
    apply_quantization_config(model, config)
    return {name: module.quantization_scheme for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _group(bits: int, kind: str = "int", **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "dynamic": False, "symmetric": True, **weights}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def _variants() -> dict[str, Variant]:
    everyone = (*MAIN, "gpt_oss")
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    by_group = {"strategy": "group", "group_size": 32}
    rows: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "w4a16": (_group(4, **by_group), everyone),
        "w4a16-asym": (_group(4, **{**by_group, "symmetric": False}), ("qwen3_moe",)),
        "w8a16": (_group(8, strategy="channel"), everyone),
        "w8a8": ({"scheme": "W8A8", "targets": "Linear"}, ("qwen3_moe",)),
        "fp8-dynamic": ({"scheme": "FP8_DYNAMIC", "targets": "Linear"}, everyone),
        "fp8-static-and-cache": (
            {"scheme": "FP8", "targets": "Linear", "kv_cache_scheme": cache, "data": True},
            ("qwen3_moe",),
        ),
        "nvfp4": ({"scheme": "NVFP4", "targets": "Linear", "data": True}, ("qwen3_moe",)),
        "fp8-block": ({"scheme": "FP8_BLOCK", "targets": "Linear"}, ("qwen3_moe",)),
        "nvfp4a16": ({"scheme": "NVFP4A16", "targets": "Linear"}, everyone),
        "mxfp4": ({"scheme": "MXFP4A16", "targets": "Linear"}, ("qwen3_moe",)),
    }
    return {
        name: Variant(partial(_write, **scheme), families, None, apart=False)
        for name, (scheme, families) in rows.items()
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run("llmcompressor", _variants(), ("compressed-tensors", "transformers"))
