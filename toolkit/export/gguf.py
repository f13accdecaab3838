"""An adapter as a GGUF LoRA file for llama.cpp and Ollama, written and read back with the `gguf` library.

llama.cpp's converter script is on no registry as a library. The names come from `gguf`'s own tables, rows are put in
the order of its tensors, and scalings are folded into B, with alpha 0, which is "no scaling of its own" over there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from toolkit.adapters.layouts import Factors, split
from toolkit.architecture import describe
from toolkit.errors import ModelError, RecipeError
from toolkit.families import GGUF_NAMES, GGUF_ROTATED_IN_PAIRS

__all__ = ["read_gguf", "write_gguf"]


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
    """llama.cpp's architecture of this family: of the same name but for hyphens and underscores, or the table's."""
    wanted = _model_type(skeleton)
    called = GGUF_NAMES.get(wanted, wanted)
    for arch, name in library.MODEL_ARCH_NAMES.items():
        if _bare(name) == _bare(called):
            return arch
    raise ModelError(f"gguf: llama.cpp has no architecture for {wanted}: export as per-expert or merged")


def _model_type(skeleton: PreTrainedModel) -> str:
    return str(skeleton.config.get_text_config().model_type).removesuffix("_text")


def _bare(name: str) -> str:
    return name.replace("-", "").replace("_", "")


def _tensors(library: Any, arch: Any, adapter: Sequence[Factors], skeleton: PreTrainedModel) -> dict[str, Any]:
    """By llama.cpp's name: A [E, R, I] and B [E, O, R] of a stack, 2-D ones of a linear, fp32, scaling folded."""
    routers = {f"{layer.router}.weight" for layer in describe(skeleton).layers}
    result: dict[str, Any] = {}
    for factors in adapter:
        A, B = factors.A_ERI.float(), factors.scaling * factors.B_EOR.float()
        if factors.is_stack:
            found = {name: (A, B[:, rows].contiguous()) for name, rows in _stacks(library, factors, skeleton)}
        elif factors.parameter in routers:
            found = {_block(library, "FFN_GATE_INP", factors): (A[0], B[0])}
        else:
            found = {name: (A[0], B[0, rows].contiguous()) for name, rows in _linears(library, arch, factors, skeleton)}
        result |= {f"{name}.weight": pair for name, pair in found.items()}
    known = {name.format(bid="*") for name in (library.TENSOR_NAMES[tensor] for tensor in library.MODEL_TENSORS[arch])}
    for name in result:
        if re.sub(r"^blk\.\d+\.", "blk.*.", name.removesuffix(".weight")) not in known:
            _refuse(name.removesuffix(".weight"), f"{library.MODEL_ARCH_NAMES[arch]} has no such tensor there")
    return result


def _stacks(library: Any, factors: Factors, skeleton: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """A stack's tensors and their rows: gate and up lie in one parameter here, in two there."""
    path, _, leaf = factors.parameter.rpartition(".")
    rows = torch.arange(factors.B_EOR.shape[1])
    if leaf != "gate_up_proj":
        kind = "FFN_DOWN_EXP" if leaf.startswith("down") else "FFN_UP_EXP"
        return [(_block(library, kind, factors), rows)]
    joined = bool(getattr(skeleton.get_submodule(path), "is_concatenated", True))
    gate, up = (rows.chunk(2)) if joined else (rows[::2], rows[1::2])
    return [(_block(library, "FFN_GATE_EXP", factors), gate), (_block(library, "FFN_UP_EXP", factors), up)]


def _block(library: Any, kind: str, factors: Factors) -> str:
    number = re.search(r"\.(\d+)\.", factors.parameter)
    if number is None:
        raise ModelError(f"gguf: {factors.parameter} lies in no numbered layer: export as per-expert or merged")
    return str(library.TENSOR_NAMES[library.MODEL_TENSOR[kind]]).format(bid=number[1])


def _linears(library: Any, arch: Any, factors: Factors, skeleton: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """A linear's tensor and the order of its rows; query and key are reordered where llama.cpp's rotation wants it."""
    config = skeleton.config.get_text_config()
    names = library.get_tensor_name_map(arch, config.num_hidden_layers)
    found = []
    for part in split(factors, skeleton):
        spelled = (part.key, factors.parameter, factors.parameter.replace(".language_model.", "."))
        name = next((n for key in spelled if (n := names.get_name(key, (".weight",)))), None)
        if name is None:
            _refuse(part.key, "its table has no name for it")
        name = name.removesuffix(".weight")
        if name.endswith(".attn_kv_b"):
            _refuse(part.key, "it is stored there as two tensors that adapters are not applied to")
        rows = part.rows
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if (_model_type(skeleton) in GGUF_ROTATED_IN_PAIRS) and (count := heads.get(name.rpartition(".")[2])):
            rows = rows.reshape(count, 2, -1).transpose(1, 2).reshape(-1)
        found.append((name, rows))
    return found


def _refuse(part: str, why: str) -> NoReturn:
    raise ModelError(f"gguf: llama.cpp takes no adapter on {part}: {why}: export as per-expert or merged")
