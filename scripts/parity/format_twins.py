"""The plain twin of a quantised checkpoint of `format_writers.py`: its package's own values under the published names.

Written without our readers and without what puts stacks together there: the layouts are stated here once more.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).with_name("format_sides")))

from tiny_families import shapes

__all__ = ["family_of", "pieces", "save_twin"]

_EXPERT = re.compile(
    r"(.*\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.(?:experts|switch_mlp)\.(?:(\d+)\.)?(?:switch_mlp\.)?"
    r"(gate_up|gate|up|down|w1|w2|w3)(?:_proj)?(?:\.(weight|bias)|_(bias))?$"
)
_PLAIN = (torch.bfloat16, torch.float16, torch.float32)
_ROLES = {"w1": "gate", "w2": "down", "w3": "up"}

Tensors = dict[str, torch.Tensor]


def family_of(folder: Path) -> str:
    """As the folder's config.json says."""
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def pieces(name: str, tensor: torch.Tensor, family: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor as (name, tensor) of each linear or bias in it; experts are called LAYER.experts.N.ROLE.weight."""
    if not (found := _EXPERT.match(name)):
        yield name.replace(".block_sparse_moe.", ".mlp."), tensor
        return
    layer, number, role = found[1], found[2], _ROLES.get(found[3], found[3])
    kind = "bias" if "bias" in (found[4], found[5]) else "weight"
    is_fused = family == "gpt_oss" and found[4] is None
    for expert, part in [(int(number), tensor)] if number else enumerate(tensor):
        rows = part.T if is_fused and kind == "weight" else part  # gpt-oss has [inputs, outputs]
        if role != "gate_up":
            yield f"{layer}.experts.{expert}.{role}.{kind}", rows
            continue
        half = len(rows) // 2
        gate, up = (rows[::2], rows[1::2]) if family == "gpt_oss" else (rows[:half], rows[half:])
        yield f"{layer}.experts.{expert}.gate.{kind}", gate
        yield f"{layer}.experts.{expert}.up.{kind}", up


def save_twin(folder: Path, out: Path) -> None:
    """Write the plain checkpoint, in fp32, with the folder's config.

    Raises:
        KeyError: a tensor of the family is neither plain in the files nor among the package's values.
    """
    family = family_of(folder)
    told = json.loads((folder / "expected.json").read_text())
    stored, expected = load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")
    plain = {name: tensor for name, tensor in stored.items() if tensor.dtype in _PLAIN}
    found = dict(piece for name, tensor in {**plain, **expected}.items() for piece in pieces(name, tensor, family))
    if told["package"] == "GPTQModel" and family == "gpt_oss":
        found |= _by_turns(found)
    tensors = {name: _published(name, shape, found).float() for name, shape in shapes(family).items()}
    config = json.loads((folder / "config.json").read_text())
    out.mkdir(parents=True)
    kept = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    (out / "config.json").write_text(json.dumps(kept))
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(own, out / "model.safetensors", {"format": "pt"})


def _by_turns(found: Mapping[str, torch.Tensor]) -> Tensors:
    """GPTQModel calls the halves of the fused rows gate and up, which stand by turns in them."""
    result = {}
    for name in found:
        if ".experts." in name and ".gate." in name:
            other = name.replace(".gate.", ".up.")
            rows = torch.cat((found[name], found[other]))
            result |= {name: rows[::2], other: rows[1::2]}
    return result


def _published(name: str, shape: tuple[int, ...], found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if not (expert := _EXPERT.match(name)):
        return found[name.replace(".block_sparse_moe.", ".mlp.")].reshape(shape)
    layer, number, role = expert[1], expert[2], _ROLES.get(expert[3], expert[3])
    if number:
        return found[f"{layer}.experts.{number}.{role}.weight"]
    kind = "bias" if expert[5] else "weight"
    made = []
    for index in range(shape[0]):
        parts = [found[f"{layer}.experts.{index}.{each}.{kind}"] for each in role.split("_")]
        rows = parts[0] if len(parts) == 1 else torch.stack(parts, 1).flatten(0, 1)
        made.append(rows.T if kind == "weight" else rows)
    return torch.stack(made)
