"""What each tensor of a merged GGUF file is stored as, its bytes, and the most that a type rounds by.

The `gguf` library writes floats and the block types of one scale by itself. For K-quants and the other types it has a
reader only; llama.cpp's own program makes those of a file in bf16 (`toolkit.export.llama_quantize`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.checkpoint.formats.gguf_file import library
from toolkit.errors import ModelError, RecipeError

__all__ = ["QUANTS", "ROUNDS_BY", "FewBits", "as_bytes", "few_bits", "kind_of", "row_bytes"]


@dataclass(frozen=True)
class FewBits:
    """How a file with matrices of type `kind` is laid out: `number` is its `general.file_type`; where `beside` is set,
    that is the type of the tensors that `leaves` does not find, or of embeddings and the output head."""

    kind: str
    number: int
    beside: str = ""
    only: str = ""


_ENDS = r"^(token_embd|output)\."
QUANTS: Mapping[str, FewBits] = {
    "f32": FewBits("F32", 0),
    "f16": FewBits("F16", 1),
    "bf16": FewBits("BF16", 32),
    "q8_0": FewBits("Q8_0", 7),
    "q5_1": FewBits("Q5_1", 9, "Q8_0"),
    "q5_0": FewBits("Q5_0", 8, "Q8_0"),
    "q4_1": FewBits("Q4_1", 3, "Q8_0"),
    "q4_0": FewBits("Q4_0", 2, "Q8_0"),
    "mxfp4": FewBits("MXFP4", 38, "Q8_0", r"_exps\.weight$"),
}
"""By the name that `--quant` takes. Below eight bits, embedding and output head are Q8_0, and with MXFP4 all but the
experts are, as in llama.cpp's own MXFP4_MOE."""

ROUNDS_BY: Mapping[str, float] = {
    "F32": 2**-22,
    "F16": 2**-10,
    "BF16": 2**-8,
    "Q8_0": 0.5 / 127 + 2**-9,
    "Q5_1": 1 / 31 + 2**-9,
    "Q5_0": 1 / 16 + 2**-9,
    "Q4_1": 1 / 15 + 2**-9,
    "Q4_0": 1 / 8 + 2**-9,
    "MXFP4": 1 / 4 + 2**-9,
}
"""The most that a value moves, as a part of the largest of its block: half a step, a whole one where the range has one
code fewer on one side (Q4_0, Q5_0), what lies between 6 and 8 in MXFP4; and the rounding of a scale to fp16."""

_STAY = r"norm\.weight$|ffn_gate_inp|conv1d|shortconv\.conv|indexer\.proj|(?<!\.weight)$"
"""Small tensors that llama.cpp wants in fp32, as all with one axis: `prepare_tensors` in its `conversion/base.py`."""


def few_bits(quant: str) -> FewBits:
    """Of a name that was asked for.

    Raises:
        RecipeError: the library cannot write that type.
    """
    found = QUANTS.get(quant.lower())
    if found is None:
        known = {kind.name for kind in library().GGMLQuantizationType}
        why = "the gguf library reads such blocks and cannot write them" if quant.upper() in known else "no such type"
        raise RecipeError(f"--quant {quant}: {why}; take one of {', '.join(QUANTS)}, or a K-quant such as q4_k_m")
    return found


def kind_of(name: str, shape: tuple[int, ...], wanted: FewBits) -> str:
    """What a tensor of that name and shape, rows first, is stored as."""
    if len(shape) < 2 or re.search(_STAY, name):
        return "F32"
    is_beside = re.search(_ENDS, name) or (wanted.only and not re.search(wanted.only, name))
    kind = wanted.beside if wanted.beside and is_beside else wanted.kind
    block, _ = _sizes(kind)
    return kind if shape[-1] % block == 0 else "F16"  # as llama.cpp's converter does


def row_bytes(kind: str, columns: int) -> int:
    """Of one row of a tensor."""
    block, size = _sizes(kind)
    return columns // block * size


def _sizes(kind: str) -> tuple[int, int]:
    gguf = library()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(block), int(size)


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AT_ONCE = 1 << 18
"""Values that are rounded at a time, so that they stay in a cache."""


def _q8_0(values: Tensor) -> Tensor:
    """As the library's own, to the bit, and three times as fast: [rows, columns / 32 · 34] bytes."""
    blocks = values.reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * torch.where(step == 0, step, 1 / step)
    codes = scaled.abs().add_(0.5).floor_().copysign_(scaled)
    made = torch.empty(len(blocks), 34, dtype=torch.uint8)
    made[:, :2] = step.half().view(torch.uint8)
    made[:, 2:] = codes.to(torch.int8).view(torch.uint8)
    return made.reshape(len(values), -1)


def as_bytes(values: Tensor, kind: str) -> Iterator[Any]:
    """fp32 values [..., columns] as the bytes of that type, a few rows after the other, uint8 arrays.

    Raises:
        ModelError: a value is beyond what fp16 holds.
    """
    rows = values.reshape(-1, values.shape[-1])
    for some in rows.split(max(1, _AT_ONCE // rows.shape[1])):
        some = some.contiguous()
        if (plain := _PLAIN.get(kind)) is not None:
            made = some.to(plain)
            if kind == "F16" and not bool(made.isfinite().all()) and bool(some.isfinite().all()):
                raise ModelError("gguf-merged: a weight is beyond 65,504, which F16 cannot hold: take --quant bf16")
            yield made.view(torch.uint8).numpy()
        elif kind == "Q8_0":
            yield _q8_0(some.float()).numpy()
        else:
            gguf = library()
            yield np.ascontiguousarray(gguf.quants.quantize(some.float().numpy(), gguf.GGMLQuantizationType[kind]))
