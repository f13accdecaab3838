"""How other programs store quantised weights: each format as data and a pure function from parts to fp32 rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from toolkit.checkpoint.formats.auto_round import read_auto_round
from toolkit.checkpoint.formats.beside import BESIDE_PACKED, refuse_changed_inputs, refuse_unknown_parts
from toolkit.checkpoint.formats.bitsandbytes import read_bitsandbytes
from toolkit.checkpoint.formats.compressed_tensors import read_compressed_tensors
from toolkit.checkpoint.formats.gptq import read_gptq
from toolkit.checkpoint.formats.hqq import read_hqq
from toolkit.checkpoint.formats.mlx import read_mlx
from toolkit.checkpoint.formats.modelopt import read_modelopt
from toolkit.checkpoint.formats.mxfp4 import read_mxfp4
from toolkit.checkpoint.formats.packed import Files, Packed, Part
from toolkit.checkpoint.formats.quark import read_quark
from toolkit.checkpoint.formats.scaled import read_fp8
from toolkit.checkpoint.formats.torchao import read_torchao
from toolkit.errors import ModelError

__all__ = ["BESIDE_PACKED", "Files", "Packed", "Part", "packed_weights"]

_READERS: dict[str, Callable[[Files], Iterator[Packed]]] = {
    "fp8": read_fp8,
    "mxfp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "mxfp4": read_mxfp4,
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
    "awq": read_gptq,
    "auto-round": read_auto_round,
    "intel/auto-round": read_auto_round,
    "bitsandbytes": read_bitsandbytes,
    "modelopt": read_modelopt,
    "quark": read_quark,
    "mlx": read_mlx,
    "metal": read_mlx,
    "hqq": read_hqq,
    "torchao": read_torchao,
}
"""By `quant_method`; each has a row in `toolkit.checkpoint.files.SOURCES`."""
_CODES = ("F8_", "F4", "F6_", "I8", "U8", "U4", "I4")
_WORDS = ("qweight", "qzeros", "weight_packed", "W_q", "_blocks", "_qdata")


def packed_weights(files: Files) -> dict[str, Packed]:
    """Every weight that is stored in parts, by its plain name.

    Raises:
        ModelError: a part is missing, a scheme is unknown, codes are left over whose scales are not known, or there is
            something about a weight that no reader knows.
    """
    refuse_changed_inputs(files)
    reader = _READERS.get(str(files.declared.get("quant_method")))
    found = {weight.name: weight for weight in reader(files)} if reader else {}
    taken = {part.key for weight in found.values() for part in weight.parts.values()}
    for key, header in files.headers.items():
        is_codes = header.dtype.startswith(_CODES) and len(header.shape) > 1
        if key not in taken and (is_codes or key.endswith(_WORDS)):
            raise ModelError(
                f"{files.name}: {key} holds codes in {header.dtype}, and nothing says what they are worth; take the "
                "unquantised checkpoint of this model"
            )
    refuse_unknown_parts(files, found)
    return found
