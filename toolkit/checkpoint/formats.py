"""The formats weights are stored in: which can be loaded, told from a checkpoint's config before anything is fetched.

transformers finds out while it loads, format by format, and would keep the weights as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from toolkit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["METHOD", "REQUIRES", "SOURCES", "declared_format"]

METHOD = "onecard_int8"
"""`quantization_config.quant_method` of our int8 checkpoints."""

REQUIRES = "onecard's int8 weights; call toolkit.register() before from_pretrained"
"""Stands as `transformers_weights` in the config.json of an int8 checkpoint.

transformers only warns of a format that it does not know and would take the integers for weights. What names no file
there it refuses, and quotes it.
"""

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
