"""Merges an adapter into a checkpoint of FP8 or MXFP4 weights, which becomes a plain bf16 one, layer by layer.

Quantised bytes cannot be added to in place. Each layer is multiplied out by transformers' own conversions, the adapter
is added in fp32, and the result is written under the family's plain keys, as if it had never been quantised.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from toolkit.adapters.layouts import Factors
from toolkit.artifact.manifest import write_json
from toolkit.checkpoint.files import write_index
from toolkit.errors import ModelError
from toolkit.quant.source import SourceWeights

__all__ = ["merge_dequantised"]

_PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_QUANTIZED = "quantization_config"


def merge_dequantised(
    base: Path, adapter: Sequence[Factors], skeleton: PreTrainedModel, folder: Path, beside: Sequence[Path]
) -> int:
    """Write the merged checkpoint in bf16 into an empty folder, a shard a layer; returns how many parameters changed.

    `beside` are the files that come along, config.json among them; what says there that it is quantised is left out.
    Tensors that were plain floats keep their dtype.

    Raises:
        ModelError: the adapter changes a parameter that the checkpoint does not hold.
    """
    source = SourceWeights(str(base))
    by_parameter = {factors.parameter: factors for factors in adapter}
    parts, weight_map, size, changed = source.parts(), dict[str, str](), 0, 0
    for number, (name, stored) in enumerate(parts.items(), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        with source.layer(name) as layer:
            changed += len(by_parameter.keys() & set(stored))
            merged = {key: _merged(layer[key], by_parameter.pop(key, None), source.stored_as(key)) for key in stored}
            tensors = {key: part.contiguous() for key, part in revert_weight_conversion(skeleton, merged).items()}
            save_file({key: tensors[key] for key in sorted(tensors)}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(part.nbytes for part in tensors.values())
    if by_parameter:
        raise ModelError(f"{base}: holds no {min(by_parameter)} that the adapter could be merged into")
    for path in beside:
        shutil.copyfile(path, folder / path.name)
    _plain_config(folder / "config.json")
    write_index(folder, weight_map, size)
    return changed


def _merged(original: Tensor, factors: Factors | None, stored: set[str]) -> Tensor:
    """In the dtype of its file where that was a plain one, otherwise in bf16."""
    if not original.is_floating_point():
        return original
    dtype = _PLAIN[min(stored)] if stored <= _PLAIN.keys() and len(stored) == 1 else torch.bfloat16
    return (original.float() if factors is None else original.float() + factors.full()).to(dtype)


def _plain_config(path: Path) -> None:
    """Text and multimodal configs declare it at the top or in the part of the text model."""
    config = _without(json.loads(path.read_bytes()))
    write_json(path, config)


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key != _QUANTIZED}
    return {key: _without(value) if key == "text_config" else value for key, value in kept.items()}
