"""auto-round, which writes in the forms of others: GPTQ's, AWQ's, MLX's, compressed-tensors' MX, and FP8 in blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from toolkit.checkpoint.formats.compressed_tensors import read_compressed_tensors
from toolkit.checkpoint.formats.gptq import read_gptq
from toolkit.checkpoint.formats.mlx import read_mlx
from toolkit.checkpoint.formats.packed import Files, Packed
from toolkit.checkpoint.formats.scaled import read_fp8

__all__ = ["read_auto_round"]

_KNOWN = re.compile(r"(?:int|float|fp\d*|mx_fp\w*|nv_fp4?(?:_with_static_gs)?)(?:_sym|_asym)?")
"""What codes are. `mx_int` looks like `mx_fp` in the files, and `nvfp4_v2` has scales in a float of its own."""


def read_auto_round(files: Files) -> Iterator[Packed]:
    """Every weight that is stored in parts, in whichever form.

    Raises:
        ModelError: a type of codes that is not read, or parts that do not fit together.
    """
    for kind in _data_types(files):
        if not _KNOWN.fullmatch(kind):
            raise files.not_read("data_type", f"the quantization_config says {kind[:80]!r}")
    if str(files.declared.get("packing_format")).endswith("mlx"):
        yield from read_mlx(files)
        return
    yield from read_gptq(files)
    yield from read_compressed_tensors(files)
    if any(files.modules("weight_scale_inv")):
        yield from read_fp8(files)


def _data_types(files: Files) -> set[str]:
    """Of the codes, as the config says for all modules and for some."""
    told = [files.declared]
    for name in ("extra_config", "regex_config"):
        more = files.declared.get(name)
        told += more.values() if isinstance(more, Mapping) else ()
    found = {own.get("data_type") for own in told if isinstance(own, Mapping)}
    return {str(kind) for kind in found if kind is not None}
