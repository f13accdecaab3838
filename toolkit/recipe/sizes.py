"""Sizes as people write them: `16GiB`, `12 GB`, `1.5g`, or a number of bytes.

pydantic's `ByteSize` takes a thousand for 1,000 in `GB`; memory is sold otherwise.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

__all__ = ["BATCHES_PER_PASS", "CALIBRATION_BATCH", "MOST_CALIBRATION_TOKENS", "Size", "size_of", "size_text"]

MOST_CALIBRATION_TOKENS = 1 << 18
"""Of `quantization.calibration_samples`: 128 sequences of 2048, as many as GPTQ's authors took."""
CALIBRATION_BATCH, BATCHES_PER_PASS = 4096, 8
"""Tokens of a batch of them, and batches that go through a layer before the next where layers are measured."""

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_EXACT = 100
"""From how many of a unit on a size is told in it."""


def size_of(text: str) -> int:
    """Bytes of `12GiB`, `12 GB`, `12g` or `12884901888`: as memory is sold, a thousand is 1,024.

    Raises:
        ValueError: not a size, or nothing.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    size = int(float(match[1]) * (1 << _UNITS[match[2]])) if match else 0
    if not size:
        raise ValueError(f"{text[:40]} is not a size; write 12GiB")
    return size


def size_text(size: int) -> str:
    """The bytes as a recipe may give them, rounded up: `14,541MiB` without the comma."""
    unit, factor = next(
        (pair for pair in (("GiB", 1 << 30), ("MiB", 1 << 20)) if size >= _EXACT * pair[1]), ("KiB", 1 << 10)
    )
    return f"{-(-size // factor)}{unit}"


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _checked(text: str) -> str:
    size_of(text)
    return text


Size = Annotated[str, BeforeValidator(_as_text), AfterValidator(_checked)]
"""A recipe's size, kept as it was written."""
