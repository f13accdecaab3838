"""Write a checkpoint of the real Qwen3-30B-A3B's shape with random weights, in int8 as `onecard quantize` writes it.

    python scripts/make_qwen3_30b_shape.py FOLDER [--layers 48] [--dtype float32]

31 GB for all 48 layers, one layer in memory at a time. The model says nothing sensible; it is there to be trained one
step with (scripts/benchmarks/large_step.py) where memory, bytes read and time are the question.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
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
SPREAD = 0.02
"""Standard deviation of the weights."""
UNIFORM = 73.6
"""Standard deviation of integers that are all equally frequent in [-127, 127]."""


def skeleton(layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """The model on meta, its int8 parameters declared as the quantizer does."""
    from transformers import AutoModelForCausalLM

    config = Qwen3MoeConfig(**{**SHAPE, "num_hidden_layers": layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    Int8Quantizer(Int8Config(), pre_quantized=True).preprocess_model(model)
    config.quantization_config = Int8Config()
    return model


def random_tensor(name: str, like: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Integers, their scales, norms of one, or normal numbers."""
    if like.dtype == torch.int8:
        integers = np.frombuffer(random.bytes(like.numel()), dtype=np.int8)
        return torch.from_numpy(np.maximum(integers, -127)).view(like.shape)
    if name.endswith("_scale"):
        return torch.full(like.shape, SPREAD / UNIFORM, dtype=like.dtype)
    if like.dim() < 2:
        return torch.ones(like.shape, dtype=like.dtype)
    normal = torch.from_numpy(random.standard_normal(like.numel(), dtype=np.float32)).view(like.shape)
    return (SPREAD * normal).to(like.dtype)


def groups(names: list[str]) -> Iterator[list[str]]:
    """What a shard holds: one layer, or what is in none."""
    by_layer: dict[str, list[str]] = {}
    for name in names:
        found = re.search(r"\.layers\.(\d+)\.", name)
        by_layer.setdefault(found[1] if found else name, []).append(name)
    yield from by_layer.values()


def write(folder: Path, layers: int, dtype: torch.dtype) -> int:
    """All shards, config and index; gives the bytes of the weights."""
    model, random, weight_map, total = skeleton(layers, dtype), np.random.default_rng(0), {}, 0
    state = model.state_dict()
    parts = list(groups(list(state)))
    with staged_folder(folder) as workplace:
        for number, names in enumerate(parts, 1):
            file = f"model-{number:05}-of-{len(parts):05}.safetensors"
            tensors = {name: random_tensor(name, state[name], random) for name in names}
            save_file(tensors, workplace / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
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
    given = parser.parse_args()
    print(f"{write(given.folder, given.layers, getattr(torch, given.dtype)) / 1e9:.2f} GB in {given.folder}")


if __name__ == "__main__":
    main()
