"""NVIDIA's modelopt: FP8 with one scale, and NVFP4 whose two scales are both multiplied."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from toolkit.checkpoint.formats.bits import fp4, grid
from toolkit.checkpoint.formats.packed import Files, Packed, Part, Tensors
from toolkit.checkpoint.formats.scaled import scaled

__all__ = ["read_modelopt"]

_GROUP = 16


def read_modelopt(files: Files) -> Iterator[Packed]:
    """Every weight with a `weight_scale`.

    Raises:
        ModelError: a scale that its inputs share (`pre_quant_scale`), or parts that do not fit together.
    """
    for module in files.modules("weight_scale"):
        key = f"{module}.weight"
        if f"{module}.pre_quant_scale" in files.headers:
            raise files.wrong(key, "has a pre_quant_scale for its inputs, which is not read")
        if f"{module}.weight_scale_2" not in files.headers:
            yield scaled(files, key, f"{module}.weight_scale")
            continue
        rows, width = files.matrix(key)
        scales = files.matrix(f"{module}.weight_scale")
        if files.headers[key].dtype != "U8" or scales != (rows, -(-2 * width // _GROUP)):
            raise files.wrong(key, "is no NVFP4 weight: its scales do not fit")
        parts = {
            "packed": Part(key),
            "scale": Part(f"{module}.weight_scale"),
            "global": Part(f"{module}.weight_scale_2", None),
        }
        yield files.packed(key, (rows, 2 * width), parts, _unpack, f"NVFP4, groups of {_GROUP}")


def _unpack(parts: Tensors) -> Tensor:
    values = fp4(parts["packed"])
    scale = parts["scale"].float() * parts["global"].float().reshape(())
    return values * grid(scale, len(values), values.shape[-1], (1, _GROUP))
