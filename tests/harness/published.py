"""What surrounds the weights of a published checkpoint: its config, a tokenizer, and what its tensors are called."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from toolkit.architecture import describe
from toolkit.plan import shapes, skeletons

__all__ = ["published_tensors", "stored_tensors", "write_surroundings"]

_TOKENIZER = Path(__file__).parents[2] / "recipes" / "quickstart" / "nano-qwen3moe-2m"
_MX_GROUP = 32


def published_tensors(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes by the names that the files of one of `toolkit.plan.shapes.published` have, were they of floats."""
    model = skeletons.shape_of(name)
    tensors = revert_weight_conversion(model, model.state_dict())
    return {key: tuple(value.shape) for key, value in tensors.items()}


def stored_tensors(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same as the files have them: dtypes, as safetensors calls them, and shapes.

    A stack of MXFP4, [E, inputs, outputs], is [E, outputs, groups, 16] `_blocks` and [E, outputs, groups] `_scales`.
    """
    stored = {key: ("BF16", shape) for key, shape in published_tensors(name).items()}
    if shapes.stored_method(name) == "mxfp4":
        for layer in describe(skeletons.shape_of(name)).layers:
            for stack in layer.stacks:
                _, (experts, inputs, outputs) = stored.pop(stack)
                groups = (experts, outputs, inputs // _MX_GROUP)
                stored |= {f"{stack}_blocks": ("U8", (*groups, _MX_GROUP // 2)), f"{stack}_scales": ("U8", groups)}
    return stored


def write_surroundings(name: str, folder: Path) -> None:
    """Its config, in bf16, and the embedded model's tokenizer: its tokens are among any vocabulary's first."""
    for file in _TOKENIZER.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(file, folder / file.name)
    values = shapes.published_config(name)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.architectures, config.dtype = [type(skeletons.shape_of(name)).__name__], "bfloat16"
    if (method := shapes.stored_method(name)) is not None:
        config.quantization_config = {"quant_method": method}
    config.save_pretrained(folder)
