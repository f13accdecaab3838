"""What weights can be stored as in the layouts that leave it to the user, and when it must be measured on texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolkit.checkpoint.config import quantised_as
from toolkit.checkpoint.files import METHOD
from toolkit.errors import RecipeError
from toolkit.export.compressed import SCHEMES
from toolkit.export.gguf_types import QUANTS, few_bits
from toolkit.export.llama_quantize import K_QUANTS, require_quantiser
from toolkit.export.mlx import BITS

__all__ = ["TAKES_QUANT", "is_rounded_again", "require_quant"]

TAKES_QUANT: Mapping[str, tuple[str, ...]] = {
    "gguf-merged": (*QUANTS, *K_QUANTS),
    "merged-vllm": tuple(SCHEMES),
    "merged-mlx": tuple(BITS),
}
"""Layouts in which weights are stored in one type of several, and the types."""
_FEW = {"int4", "4bit", *K_QUANTS, *(name for name, kind in QUANTS.items() if kind.beside)}
"""Types of less than eight bits."""
_FLOATS = ("f32", "f16", "bf16")


def require_quant(
    format: str, quant: str | None, base_gguf: Path | None = None, llama_quantize: str | None = None
) -> None:
    """Raise `RecipeError` unless the layout has that type, or needs none, and what makes it is here."""
    is_k_quant = format == "gguf-merged" and (quant or "").lower() in K_QUANTS
    if llama_quantize and not is_k_quant:
        raise RecipeError("--llama-quantize: makes K-quants of gguf-merged alone, such as --quant q4_k_m; leave it out")
    if format not in TAKES_QUANT and quant:
        raise RecipeError(f"--format {format}: takes no --quant; leave it out")
    if format != "gguf-merged" and base_gguf:
        raise RecipeError(f"--format {format}: takes no --base-gguf; leave it out")
    if is_k_quant:
        require_quantiser(quant or "", llama_quantize)
    elif format == "gguf-merged" and quant:
        few_bits(quant)
    elif format in TAKES_QUANT and format != "gguf-merged" and quant not in TAKES_QUANT[format]:
        said = f"--quant {quant}: no such type" if quant else f"--format {format}: wants a type"
        raise RecipeError(f"{said}; give --quant one of {', '.join(TAKES_QUANT[format])}")


def is_rounded_again(base: Path, format: str, quant: str | None = None) -> bool:
    """Whether this layout rounds weights that were rounded before, or to few bits, so that some of the adapter may be
    lost."""
    quant = None if quant is None else quant.lower()
    if format == "merged-source" or quant in _FEW:
        return True
    rounds = format == "merged-int8" or (format in TAKES_QUANT and quant not in _FLOATS)
    return rounds and quantised_as(base) not in (None, METHOD)  # which nothing is merged into
