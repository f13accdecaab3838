"""The golden cases of quantised weights, `tests/fixtures/formats`, as a reader of a checkpoint sees them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from toolkit.checkpoint.files import Header
from toolkit.checkpoint.formats import Files, Packed
from toolkit.checkpoint.weights import PackedSlice

__all__ = ["CASES", "DTYPES", "FOLDER", "Case", "Whole", "as_slice"]

FOLDER = Path(__file__).parents[1] / "fixtures" / "formats"
CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())
_EXPECTED = "expected."
DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
}
"""By the names that safetensors has for them."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Whole:
    """A tensor in memory as a slice of safetensors."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index]


class Case:
    """Tensors as a package stored them, `expected` as it takes them, and what its config says."""

    def __init__(self, name: str) -> None:
        told, stored = CASES[name], load_file(FOLDER / f"{name}.safetensors")
        self.name, self.dtype = name, getattr(torch, told["dtype"])
        self.expected = {key.removeprefix(_EXPECTED): stored[key] for key in stored if key.startswith(_EXPECTED)}
        self.tensors = {key: stored[key] for key in stored if not key.startswith(_EXPECTED)}
        self.declared: dict[str, Any] = copy.deepcopy(told["quantization_config"] or {})
        self.declared.setdefault("quant_method", {"mlx": "mlx", "nvidia-modelopt": "modelopt"}.get(told["package"]))
        self.metadata: dict[str, str] = dict(told.get("metadata") or {})

    def files(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        declared: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Files:
        """Of the tensors as they are now, or of others."""
        tensors = self.tensors if tensors is None else tensors
        headers = {key: header(key, tensor) for key, tensor in tensors.items()}
        told = self.declared if declared is None else declared
        return Files(self.name, headers, told, tensors.__getitem__, self.metadata if metadata is None else metadata)


def header(key: str, tensor: torch.Tensor) -> Header:
    """What a file would say of a tensor."""
    return Header(key, _NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)


def as_slice(packed: Packed, tensors: Mapping[str, torch.Tensor]) -> PackedSlice:
    """A weight, unread."""
    return PackedSlice(packed, {part.key: Whole(tensors[part.key]) for part in packed.parts.values()})
