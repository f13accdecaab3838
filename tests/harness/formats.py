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

__all__ = ["CASES", "FOLDER", "Case", "Whole", "as_slice"]

FOLDER = Path(__file__).parents[1] / "fixtures" / "formats"
CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())
_EXPECTED = "expected."
_DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
}


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

    def files(self) -> Files:
        """Of the tensors as they are now."""
        headers = {key: header(key, tensor) for key, tensor in self.tensors.items()}
        return Files(self.name, headers, self.declared, self.tensors.__getitem__, self.metadata)


def header(key: str, tensor: torch.Tensor) -> Header:
    """What a file would say of a tensor."""
    return Header(key, _DTYPES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)


def as_slice(packed: Packed, tensors: Mapping[str, torch.Tensor]) -> PackedSlice:
    """A weight, unread."""
    return PackedSlice(packed, {part.key: Whole(tensors[part.key]) for part in packed.parts.values()})
