"""Write a checkpoint of the real Qwen3-30B-A3B's shape with random weights, in int8 as `onecard quantize` writes it.

    python scripts/make_qwen3_30b_shape.py FOLDER [--layers 48] [--dtype float32] [--smaller N]

33 GB for all 48 layers, none of them in memory; `--smaller` divides widths, experts and vocabulary, to try it out. The
model says nothing sensible; it is there to be trained one step with (scripts/benchmarks/large_step.py) where memory,
bytes read and time are the question.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3MoeConfig

from toolkit.durable import staged_folder
from toolkit.quant import Int8Config
from toolkit.quant.quantizer import Int8Quantizer

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
DIVIDED = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts")
"""What `--smaller` divides, down to 8."""
SPREAD = 0.02
"""Standard deviation of the weights."""
UNIFORM = 73.6
"""Standard deviation of integers that are all equally frequent in [-127, 127]."""


def skeleton(layers: int, dtype: torch.dtype, smaller: int = 1) -> PreTrainedModel:
    """The model on meta, its int8 parameters declared as the quantizer does."""
    from transformers import AutoModelForCausalLM

    sizes = {name: max(SHAPE[name] // smaller, 8) for name in DIVIDED} if smaller > 1 else {}
    config = Qwen3MoeConfig(**{**SHAPE, **sizes, "num_hidden_layers": layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    Int8Quantizer(Int8Config(), pre_quantized=True).preprocess_model(model)
    config.quantization_config = Int8Config()
    return model


class Pools:
    """Random numbers that every tensor is cut from at a random place: drawing 31 GB would take longer than writing."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        integers = np.frombuffer(self._random.bytes(64 << 20), dtype=np.int8)
        self._integers = np.maximum(integers, -127)
        self._normal = SPREAD * self._random.standard_normal(16 << 20, dtype=np.float32)

    def parts(self, name: str, like: torch.Tensor) -> Iterator[bytes | memoryview]:
        """The bytes of one tensor: integers, their scales, norms of one, or normal numbers."""
        if like.dtype != torch.int8 and (name.endswith("_scale") or like.dim() < 2):
            value = SPREAD / UNIFORM if name.endswith("_scale") else 1.0
            yield torch.full(like.shape, value, dtype=like.dtype).view(torch.uint8).numpy().tobytes()
            return
        pool = torch.from_numpy(self._integers if like.dtype == torch.int8 else self._normal).to(like.dtype)
        left = like.numel()
        while left:
            start = int(self._random.integers(0, len(pool) // 2))
            part = pool[start : start + min(left, len(pool) // 2)]
            left -= len(part)
            yield memoryview(part.view(torch.uint8).numpy())


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], pools: Pools) -> int:
    """One safetensors file, written from the pools with no tensor in memory; gives the bytes of its tensors."""
    names, header, offset = sorted(tensors, key=lambda name: -tensors[name].itemsize), {}, 0
    for name in names:
        size = tensors[name].nbytes
        kind = {torch.int8: "I8", torch.float32: "F32", torch.bfloat16: "BF16"}[tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.writelines(pools.parts(name, tensors[name]))
    return offset


def groups(names: list[str]) -> Iterator[list[str]]:
    """What a shard holds: one layer, or what is in none."""
    by_layer: dict[str, list[str]] = {}
    for name in names:
        found = re.search(r"\.layers\.(\d+)\.", name)
        by_layer.setdefault(found[1] if found else name, []).append(name)
    yield from by_layer.values()


def write(folder: Path, layers: int, dtype: torch.dtype, smaller: int = 1) -> int:
    """All shards, config and index; gives the bytes of the weights."""
    model, pools, weight_map, total = skeleton(layers, dtype, smaller), Pools(), {}, 0
    state = model.state_dict()
    parts = list(groups(list(state)))
    with staged_folder(folder) as workplace:
        for number, names in enumerate(parts, 1):
            file = f"model-{number:05}-of-{len(parts):05}.safetensors"
            total += write_shard(workplace / file, {name: state[name] for name in names}, pools)
            weight_map |= dict.fromkeys(names, file)
            print(f"\r{number}/{len(parts)} shards, {total / 1e9:.1f} GB", end="", flush=True)
        print()
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (workplace / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(workplace)
    return total


def main() -> None:
    """Parse, write, say how much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of what is not int8")
    parser.add_argument("--smaller", type=int, default=1, metavar="N", help="divide widths, experts, vocabulary by N")
    given = parser.parse_args()
    size = write(given.folder, given.layers, getattr(torch, given.dtype), given.smaller)
    print(f"{size / 1e9:.2f} GB in {given.folder}")


if __name__ == "__main__":
    main()
