"""A checkpoint's config and its model without weights, whatever the files are: a folder, a Hub name, a GGUF."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from toolkit.architecture import on_meta
from toolkit.checkpoint.files import GGUF, declared_format, gguf_at
from toolkit.errors import ModelError, first_line

__all__ = ["WRONG_CONFIG", "built", "in_one_line", "quantised_as", "read_config", "read_generation_config", "skeleton"]

WRONG_CONFIG = (
    *(ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError, IndexError),
    StrictDataclassError,
)
"""What transformers raises, in one family or another, for values of the wrong type or that make no sense together."""


def in_one_line(error: BaseException) -> str:
    """What transformers says of a config, which takes two lines for a field of the wrong type."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_config(name_or_path: str, revision: str = "main") -> PretrainedConfig:
    """The checkpoint's config.

    Raises:
        ModelError: none there, or a family this transformers does not know.
    """
    if path := gguf_at(name_or_path):
        from toolkit.checkpoint.gguf_source import config_of

        return config_of(path)
    try:
        return AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name_or_path}: {first_line(error)}") from None
    except WRONG_CONFIG as error:
        raise ModelError(f"{name_or_path}: config.json: {in_one_line(error)}; {_FIX}") from None


_FIX = "fix config.json, or download the checkpoint again"


def built(name: str, config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device.

    Raises:
        ModelError: none can be built of it.
    """
    try:
        return on_meta(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: {first_line(error)}") from None
    except WRONG_CONFIG as error:
        said = f"no {config.model_type} can be built of its config.json: {in_one_line(error)}"
        raise ModelError(f"{name}: {said}; {_FIX}") from None


def read_generation_config(name_or_path: str, revision: str = "main") -> GenerationConfig | None:
    """What the checkpoint says of generation, None where it has no such file."""
    try:
        if path := gguf_at(name_or_path):
            return GenerationConfig.from_pretrained(path if path.is_dir() else path.parent)
        return GenerationConfig.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError):  # many checkpoints have none
        return None


def skeleton(name_or_path: str, *, revision: str = "main") -> PreTrainedModel:
    """The model on the meta device, from its config alone: shapes and names, no weights.

    Raises:
        ModelError: no config there, a family this transformers does not know, or one that needs remote code.
    """
    return built(name_or_path, read_config(name_or_path, revision))


def quantised_as(folder: Path) -> str | None:
    """What the weights of a checkpoint that is here are quantised as, `gguf` among them; None where they are floats."""
    if gguf_at(folder):
        return GGUF
    declared = declared_format(str(folder), read_config(str(folder)))
    return None if declared is None else str(declared["quant_method"])
