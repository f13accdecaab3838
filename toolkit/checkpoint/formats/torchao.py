"""torchao's tensor classes as safetensors holds them: `X._weight_qdata` with `_weight_scale` beside it, and so on.

A stack of experts is stored likewise, `experts._gate_up_proj_qdata`. The file's metadata names the class of each; it
is asked only where the shapes do not tell, since its keys do not always agree with the names of the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toolkit.checkpoint.formats.bits import fp4, grid, powers
from toolkit.checkpoint.formats.packed import FLOATS, Files, Packed, Part, Tensors
from toolkit.checkpoint.formats.scaled import scaled

__all__ = ["read_torchao"]

_NAME = re.compile(r"(.*\.)_(\w+)_qdata$")
_PLAIN = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
_MX = {"MXTensor": 32, "NVFP4Tensor": 16}
"""Classes with a scale for so many inputs, which may lie in tiles of 128 rows and 4 columns."""


def read_torchao(files: Files) -> Iterator[Packed]:
    """Every weight, bias or stack with a `_qdata`.

    Raises:
        ModelError: a class that is not read, or parts that do not fit together.
    """
    for key in files.headers:
        if not (found := _NAME.match(key)):
            continue
        name, stem = found[1] + found[2], f"{found[1]}_{found[2]}_"
        told = _told(files, name)
        kind = str(told.get("_type") or "nothing known")
        for part in ("scale", *_parts(told)):
            files.shape(f"{stem}{part}")
        if files.headers[f"{stem}scale"].dtype.startswith("F8_"):
            yield _micro(files, name, stem, kind, told)
        elif (kind in _PLAIN or not told) and files.headers[key].dtype in ("I8", "F8_E4M3", "F8_E5M2"):
            yield _plain(files, name, stem)
        else:
            raise files.wrong(key, f"stored as {kind} in {files.headers[key].dtype}, which is not read")


def _told(files: Files, name: str) -> Mapping[str, Any]:
    """What the metadata says of a tensor, under its own name or under the one that transformers renames it to."""
    text = files.metadata.get(name) or files.metadata.get(name.replace(".block_sparse_moe.", ".mlp."))
    try:
        told = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise files.wrong(name, "the file's metadata of it is not JSON") from None
    return told if isinstance(told, Mapping) else {}


def _parts(told: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that a tensor is made of, as far as the metadata says them."""
    names = told.get("_tensor_data_names")
    return [str(name) for name in names] if isinstance(names, list) else []


def _plain(files: Files, name: str, stem: str) -> Packed:
    key, zero = f"{stem}qdata", f"{stem}zero_point"
    has_zero = zero in files.headers
    if len(files.shape(key)) > 1:
        return scaled(files, key, f"{stem}scale", zero=zero if has_zero else None, name=name)
    # Patterns of module names also fit their biases and norms.
    shape, scale = files.shape(key), files.shape(f"{stem}scale")
    if scale != (1,) or (has_zero and files.shape(zero) != (1,)):
        raise files.wrong(key, f"its scales are {'×'.join(map(str, scale))}, the tensor {'×'.join(map(str, shape))}")
    parts = {"codes": Part(key), "scale": Part(f"{stem}scale", None)}
    if has_zero:
        parts["zero"] = Part(zero, None)
    return files.packed(name, shape, parts, _vector, "8-bit values, one scale")


def _vector(parts: Tensors) -> Tensor:
    codes = parts["codes"].float()
    if "zero" in parts:
        codes = codes - parts["zero"].float()
    return codes * parts["scale"].float()


def _micro(files: Files, name: str, stem: str, kind: str, told: Mapping[str, Any]) -> Packed:
    key, scales = f"{stem}qdata", f"{stem}scale"
    details = told.get("_data")
    is_tiled = details.get("is_swizzled_scales") if isinstance(details, Mapping) else None
    if kind not in _MX or not isinstance(is_tiled, bool):
        if kind in _MX or not told:
            raise files.wrong(key, "the file's metadata does not say in which order its scales lie")
        raise files.wrong(key, f"stored as {kind} with FP8 scales, which is not read")
    rows, width = files.matrix(key)
    is_fp4 = files.headers[key].dtype in ("U8", "F4")
    columns = width * 2 if is_fp4 else width
    groups = columns // _MX[kind]
    wanted = (-(-rows // 128) * 32, -(-groups // 4) * 16) if is_tiled else (rows, groups)
    if columns % _MX[kind] or files.shape(scales) != wanted or not (is_fp4 or files.headers[key].dtype == "F8_E4M3"):
        found = "×".join(map(str, files.shape(scales)))
        raise files.wrong(key, f"{rows}×{columns} in {files.headers[key].dtype} does not fit its {found} scales")
    axis = None if is_tiled else 0
    parts = {"codes": Part(key, axis), "scale": Part(scales, axis)}
    if f"{stem}per_tensor_scale" in files.headers:
        parts["global"] = Part(f"{stem}per_tensor_scale", None)
        files.check_one(f"{stem}per_tensor_scale", *FLOATS)
    unpack = partial(_unpack_micro, is_fp4=is_fp4, is_tiled=is_tiled, groups=groups, is_power=kind == "MXTensor")
    words = "NVFP4" if kind == "NVFP4Tensor" else "MXFP4" if is_fp4 else "MXFP8"
    return files.packed(name, (rows, columns), parts, unpack, f"{words}, groups of {_MX[kind]}")


def _unpack_micro(parts: Tensors, *, is_fp4: bool, is_tiled: bool, groups: int, is_power: bool) -> Tensor:
    values = fp4(parts["codes"]) if is_fp4 else parts["codes"].float()
    scale = _untiled(parts["scale"].view(torch.uint8), len(values), groups) if is_tiled else parts["scale"]
    scale = powers(scale) if is_power else scale.view(torch.float8_e4m3fn).float()
    if "global" in parts:
        scale = scale * parts["global"].float().reshape(())
    return values * grid(scale, *values.shape)


def _untiled(scale: Tensor, rows: int, groups: int) -> Tensor:
    """Scales by rows out of tiles of 128×4, in which 32 rows at a distance of 32 lie side by side."""
    tiles = scale.reshape(-(-rows // 128), -(-groups // 4), 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)[:rows, :groups]
