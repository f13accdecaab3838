"""AMD's Quark: FP8 and int8 with a scale a tensor or a row, and MXFP4. Its packed integers and MXFP6 are not read.

The tensors are called as modelopt calls them. Rotations that are not folded into weights are refused in `beside`.
"""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.checkpoint.formats.modelopt import four_bit_floats
from toolkit.checkpoint.formats.packed import Files, Packed
from toolkit.checkpoint.formats.scaled import scaled

__all__ = ["read_quark"]

_ONE_BYTE = ("F8_E4M3", "F8_E5M2", "I8")


def read_quark(files: Files) -> Iterator[Packed]:
    """Every weight with a `weight_scale`.

    Raises:
        ModelError: codes of another kind, or parts that do not fit together.
    """
    for module in files.modules("weight_scale"):
        key, scales, zeros = (f"{module}.{part}" for part in ("weight", "weight_scale", "weight_zero_point"))
        files.shape(key)
        dtype, (rows, width) = files.headers[key].dtype, files.matrix(key)
        if dtype in _ONE_BYTE and files.shape(scales) in ((), (1,), (rows,), (rows, 1)):
            yield scaled(files, key, scales, zero=zeros if dtype == "I8" else None)
        elif dtype == "U8" and zeros not in files.headers and files.shape(scales) == (rows, width // 16):
            files.check_dtype(scales, "U8", "F8_E8M0")
            yield four_bit_floats(files, key, f"{module}.", is_stack=False)
        else:
            raise files.not_read(key, f"codes of Quark in {dtype}")
