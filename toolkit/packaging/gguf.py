"""An adapter as a GGUF LoRA file for llama.cpp and Ollama, written and read back with the `gguf` library.

llama.cpp's converter script is on no registry as a library. The names come from `gguf`'s own table of architectures;
scalings are folded into B, with alpha 0, which llama.cpp reads as "no scaling of its own".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from toolkit.adapters.layouts import Factors, split
from toolkit.errors import ModelError, RecipeError

__all__ = ["MODELFILE", "read_gguf", "write_gguf"]

MODELFILE = "FROM ./base.gguf\nADAPTER ./adapter.gguf\n"
"""For `ollama create`; base.gguf is llama.cpp's conversion of the base."""


def write_gguf(adapter: Sequence[Factors], skeleton: PreTrainedModel, path: Path) -> None:
    """Write `path`. Raises `ModelError` where llama.cpp has no such architecture or no name for a part."""
    library = _library()
    arch = _architecture(library, skeleton)
    writer = library.GGUFWriter(str(path), library.MODEL_ARCH_NAMES[arch])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for name, (A, B) in _tensors(library, arch, adapter, skeleton).items():
        writer.add_tensor(f"{name}.lora_a", A.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", B.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, adapter: Sequence[Factors], skeleton: PreTrainedModel) -> float:
    """Largest difference of the file's updates from the adapter's, over the largest update."""
    library = _library()
    there = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in library.GGUFReader(str(path)).tensors}
    wanted = _tensors(library, _architecture(library, skeleton), adapter, skeleton)
    if {f"{name}.lora_{side}" for name in wanted for side in "ab"} != there.keys():
        raise ModelError(f"{path}: other tensors than were written: export again")
    worst, largest = 0.0, 0.0
    for name, (A, B) in wanted.items():
        mine, found = B @ A, there[f"{name}.lora_b"] @ there[f"{name}.lora_a"]
        worst, largest = max(worst, float((mine - found).abs().max())), max(largest, float(mine.abs().max()))
    return worst / largest if largest else worst


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise RecipeError("the gguf library is not installed: pip install 'onecard[gguf]'") from None
    return gguf


def _architecture(library: Any, skeleton: PreTrainedModel) -> Any:
    """The architecture that llama.cpp calls as transformers does, hyphens and underscores aside."""
    wanted = skeleton.config.get_text_config().model_type.removesuffix("_text")
    for arch, name in library.MODEL_ARCH_NAMES.items():
        if name.replace("-", "").replace("_", "") == wanted.replace("_", ""):
            return arch
    raise ModelError(f"gguf: llama.cpp has no architecture by the name of {wanted}: export as per-expert or merged")


def _tensors(library: Any, arch: Any, adapter: Sequence[Factors], skeleton: PreTrainedModel) -> dict[str, Any]:
    """By llama.cpp's name: A [E, R, I] and B [E, O, R] of a stack, 2-D ones of a linear, fp32, scaling folded."""
    names = library.get_tensor_name_map(arch, skeleton.config.get_text_config().num_hidden_layers)
    result: dict[str, Any] = {}
    for factors in adapter:
        by_projection: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for part in split(factors, skeleton):
            key = re.sub(r"(experts)\.\d+\.", r"\1.", part.key) if factors.is_stack else part.key
            by_projection.setdefault(key, []).append((part.expert, part.rows))
        for key, rows in by_projection.items():
            name = names.get_name(key, try_suffixes=(".weight",))
            if name is None:
                raise ModelError(f"gguf: llama.cpp has no name for {key}: export as per-expert or merged")
            B = torch.stack(
                [factors.scaling * factors.B_EOR[e][r].float() for e, r in sorted(rows, key=lambda x: x[0])]
            )
            A = factors.A_ERI.float()
            result[f"{name}.weight"] = (A, B) if factors.is_stack else (A[0], B[0])
    return result
