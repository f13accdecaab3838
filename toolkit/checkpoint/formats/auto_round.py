"""auto-round, which writes in the forms of others: GPTQ's, AWQ's, compressed-tensors' MX formats, and FP8 in blocks."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.checkpoint.formats.compressed_tensors import read_compressed_tensors
from toolkit.checkpoint.formats.gptq import read_gptq
from toolkit.checkpoint.formats.packed import Files, Packed
from toolkit.checkpoint.formats.scaled import read_fp8

__all__ = ["read_auto_round"]


def read_auto_round(files: Files) -> Iterator[Packed]:
    """Every weight that is stored in parts, in whichever form.

    Raises:
        ModelError: parts that do not fit together.
    """
    yield from read_gptq(files)
    yield from read_compressed_tensors(files)
    if any(files.modules("weight_scale_inv")):
        yield from read_fp8(files)
