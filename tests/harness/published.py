"""What surrounds the weights of a published checkpoint: its config, a tokenizer, and what its tensors are called."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from toolkit.plan import shapes, skeletons

__all__ = ["published_tensors", "write_surroundings"]

_TOKENIZER = Path(__file__).parents[2] / "recipes" / "quickstart" / "nano-qwen3moe-2m"


def published_tensors(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes by the names that the files of one of `toolkit.plan.shapes.published` have."""
    model = skeletons.shape_of(name)
    tensors = revert_weight_conversion(model, model.state_dict())
    return {key: tuple(value.shape) for key, value in tensors.items()}


def write_surroundings(name: str, folder: Path) -> None:
    """Its config, in bf16, and the embedded model's tokenizer: its tokens are among any vocabulary's first."""
    for file in _TOKENIZER.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(file, folder / file.name)
    values = shapes.published_config(name)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.architectures, config.dtype = [type(skeletons.shape_of(name)).__name__], "bfloat16"
    config.save_pretrained(folder)
