"""What an export is given and what it tells, for every layout alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from toolkit.adapters.layouts import Factors
from toolkit.export.into_source import Homes
from toolkit.export.survival import Survival, streamed_logits, survival

__all__ = ["ROUNDED", "Job", "Made"]

ROUNDED = "merged weights, in the most that their type rounds by"
"""What is compared where a layout rounds."""


@dataclass(frozen=True)
class Job:
    """An artifact, the checkpoint it was trained on (`source`), the one to start from (`base`), and where to write.

    Args:
        skeleton: of `base`, on meta. quant: what weights are to be stored as, as the layout calls it.
        base_gguf: a GGUF file of the base, whose metadata and tokenizer are kept. llama_quantize: llama.cpp's program.
    """

    artifact: Path
    source: Path
    base: Path
    adapter: list[Factors]
    skeleton: PreTrainedModel
    folder: Path
    texts: Sequence[Sequence[int]] = ()
    labels: Sequence[Sequence[int]] = ()
    homes: Homes | None = None
    quant: str | None = None
    base_gguf: Path | None = None
    llama_quantize: str | None = None

    def measured(self, written: Path) -> Survival | None:
        """What is left of the adapter in a checkpoint that was written, asked of the texts; None without any."""
        if not self.texts:
            return None
        return survival(self.base, self.adapter, self.texts, partial(streamed_logits, written), self.labels)


@dataclass(frozen=True)
class Made:
    """As `Export` has them."""

    compared: str
    difference: float
    bound: float
    survival: Survival | None = None
    kept: Sequence[str] = ()
    left_out: Sequence[str] = ()
    stored: Mapping[str, int] = field(default_factory=dict)
    fell_back: Sequence[str] = ()
    head: str = ""
