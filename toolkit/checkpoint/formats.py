"""The formats weights are stored in: which can be loaded, told from a checkpoint's config before anything is fetched.

transformers finds out while it loads, format by format, and would keep the weights as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from toolkit.errors import ModelError
from toolkit.registration import METHOD

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["SOURCES", "declared_format"]

SOURCES = ("fp8", "mxfp8", "mxfp4")
"""Quantised formats that are read: transformers multiplies each tensor out and it is rounded to int8 at once."""


def declared_format(name_or_path: str, config: PretrainedConfig) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint, None where its weights are plain floats.

    Raises:
        ModelError: a format that can be neither loaded nor requantised.
    """
    parts = (config, config.get_text_config())
    declared = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    if declared is None:
        return None
    declared = dict(declared) if isinstance(declared, Mapping) else {}
    method = declared.get("quant_method")
    if method not in (METHOD, *SOURCES):
        raise ModelError(
            f"{name_or_path}: its weights are quantised as {method or 'something without a quant_method'}; only "
            f"{', '.join(SOURCES)} can be requantised, so take the unquantised checkpoint of this model"
        )
    return declared
