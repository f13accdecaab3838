"""K-quants of a merged GGUF file, made by llama.cpp's own quantiser of one in bf16, and compared with that.

The `gguf` library reads such blocks and cannot write them: their scales come from a search that llama.cpp alone has.
Its program `llama-quantize` is called, or its library in the `cyllama` wheel. By its rules norms and routers stay
floats, and some tensors get more bits. A K-quant takes 256 values at a time: rows of another length get another type.
"""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from itertools import dropwhile
from pathlib import Path

import torch
from torch import Tensor

from toolkit.checkpoint.formats.gguf_file import GgufFile, Slice, read_header
from toolkit.checkpoint.formats.gguf_undo import multiply_out
from toolkit.errors import ModelError, RecipeError, ResourceError
from toolkit.steps import advance, part

__all__ = ["K_QUANTS", "fell_back", "quantise", "require_quantiser", "require_space"]

K_QUANTS: Mapping[str, int] = {
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "q3_k": 12,
    "q4_k": 15,
    "q5_k": 17,
}
"""By the name that `--quant` takes, `llama_ftype` of llama.h; those that want no importance matrix."""

_BLOCK = 256
"""Values of a K-quant's block."""
_GRIDS = {
    **dict.fromkeys(("Q4_K", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL"), (4, 32)),
    **dict.fromkeys(("Q5_K", "Q5_0", "Q5_1"), (5, 32)),
    "Q2_K": (2, 16),
    "Q3_K": (3, 16),
    "Q6_K": (6, 16),
    "Q8_0": (8, 32),
}
"""Bits of a value, and how many values share a scale."""
_PROGRAM, _WHEEL = "llama-quantize", "cyllama"
_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


def require_quantiser(quant: str, program: str | None) -> str:
    """The program's path, or "" for that of the wheel.

    Raises:
        RecipeError: there is neither.
    """
    if found := shutil.which(program or _PROGRAM):
        return found
    if program:
        raise RecipeError(f"--llama-quantize {program}: no program there; give the path of llama.cpp's llama-quantize")
    if importlib.util.find_spec(_WHEEL):
        return ""
    raise RecipeError(
        f"--quant {quant}: made by llama.cpp's own quantiser, which is not here: pip install 'onecard[kquants]', or "
        "name the program with --llama-quantize PATH"
    )


def require_space(floats: Path, quant: str | None) -> None:
    """Raise `ResourceError` where the disk cannot hold a file as long as `floats` is to be, and what is made of it."""
    size = floats.stat().st_size
    bits = int(re.sub(r"\D.*", "", quant.lower().lstrip("iq"))) if quant else 0
    needed = size - floats.stat().st_blocks * 512 + size * bits // 16
    if needed > (free := shutil.disk_usage(floats.parent).free):
        raise ResourceError(
            f"{floats.parent.parent}: {free / 1e9:.3g} GB free, the export needs {needed / 1e9:.3g} GB; give a folder "
            "on another disk"
        )


@part("quantise")
def quantise(floats: Path, made: Path, quant: str, program: str | None) -> float:
    """Make a file of `quant` out of one in floats; how far off it is, in the most that its types round by.

    That is the root mean square of a tensor's differences over that of its values. Floats must stay as they are.

    Raises:
        ModelError: the quantiser fails, or writes other tensors. ResourceError: the disk is full.
    """
    source = read_header(floats)
    _run(require_quantiser(quant, program), source, floats, made, str(K_QUANTS[quant.lower()]))
    result = read_header(made)
    before, after = _shapes(source), _shapes(result)
    if before != after:
        raise ModelError("gguf-merged: the quantiser wrote other tensors than it was given: not exported")
    worst = 0.0
    for number, name in enumerate(before, 1):
        worst = max(worst, _apart(source.slice(name), result.slice(name)))
        advance(number, len(before), "tensors")
    return worst


def _shapes(file: GgufFile) -> dict[str, tuple[int, ...]]:
    """By name, without axes of one at the front, which llama.cpp does not write again."""
    return {name: tuple(dropwhile(lambda size: size == 1, held.shape)) for name, held in file.tensors.items()}


def _run(program: str, source: GgufFile, floats: Path, made: Path, number: str) -> None:
    side, threads = str(Path(__file__).with_name("quantiser_side.py")), str(torch.get_num_threads())
    is_rounded = any(not tensor.is_plain for tensor in source.tensors.values())  # what the base's own file had beside
    options = ["--allow-requantize"] if is_rounded else []
    command = [sys.executable, side, program, *options, str(floats), str(made), number, threads]
    last = "no message"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    try:
        for line in process.stdout or ():
            last = line.strip() or last
            if found := _PROGRESS.search(line):
                advance(int(found[1]), int(found[2]), "tensors")
        process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()
    if process.returncode and shutil.disk_usage(made.parent).free < 1 << 20:
        raise ResourceError(f"{made.parent.parent}: the disk is full; free space or give another folder")
    if process.returncode:
        raise ModelError(f"gguf-merged: the quantiser ended with {process.returncode}: {last[:300]}")


def _apart(wanted: Slice, found: Slice) -> float:
    """Of one tensor, a matrix at a time."""
    kind, off, size = found.get_dtype(), 0.0, 0.0
    if kind == wanted.get_dtype():
        return 0.0 if torch.equal(wanted[...].flatten(), found[...].flatten()) else float("inf")
    for values, stored in zip(_matrices(wanted), _matrices(found), strict=True):
        numbers = multiply_out(stored, kind) if kind in _GRIDS else stored
        off += float((numbers.float() - values.float()).square().sum(dtype=torch.float64))
        size += float(values.float().square().sum(dtype=torch.float64))
    error = math.sqrt(off / max(size, 1e-300)) / _rounds_by(kind)
    return error if error == error else float("inf")


def _matrices(tensor: Slice) -> list[Tensor]:
    stack = tensor[...]
    return list(stack.flatten(0, -3)) if stack.dim() > 2 else [stack.view(-1, stack.shape[-1])]


def _rounds_by(kind: str) -> float:
    """A step over √12 where the largest of n values is all there is, √n times their root mean square."""
    if kind not in _GRIDS:
        return 2.0**-8  # a plain type of 16 bits
    bits, together = _GRIDS[kind]
    return 2 * math.sqrt(together / 12) / (int(2**bits) - 1)


def fell_back(floats: Path, made: Path) -> tuple[str, ...]:
    """Tensors whose rows no K-quant can hold, all layers as one: name, type, and how many there are."""
    before, after = read_header(floats).tensors, read_header(made).tensors
    counted = Counter(
        (re.sub(r"\.\d+\.", ".*.", name), tensor.kind)
        for name, tensor in after.items()
        if tensor.shape[-1] % _BLOCK and tensor.kind != before[name].kind
    )
    return tuple(f"{name} as {kind} ({count})" for (name, kind), count in counted.items())
