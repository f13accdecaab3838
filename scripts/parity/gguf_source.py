"""Does a GGUF file that llama.cpp's own converter wrote come back as the model that it was made of?

    .venv/bin/python scripts/parity/gguf_source.py [FAMILY …] [--json FILE]

Each family's tiny random checkpoint, with settings other than its defaults wherever a file can say so, is converted in
fp32 and read from the file alone: the config from metadata (where that does not hold it, from config.json), every
parameter from its tensors. Prints how many parameters are the same to the bit, how far off the others are, and the
logits' largest difference over their standard deviation. Blocks of every type that ggml makes of random numbers are
compared with what its own C code makes of them. Exits with 1 where a family is not read, or is further off than fp32
rounds on the converter's side, or a block differs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts/parity")]

from layouts import NANO, family_parser  # noqa: E402
from llama_cpp import TOKENS, other_side  # noqa: E402

from tests.harness.families import build, tiny_config  # noqa: E402
from toolkit.architecture import auto_class  # noqa: E402
from toolkit.checkpoint.formats.gguf import GgufCheckpoint, read_gguf  # noqa: E402
from toolkit.checkpoint.formats.gguf_config import is_named, model_types  # noqa: E402
from toolkit.checkpoint.formats.gguf_undo import can_multiply_out, multiply_out  # noqa: E402
from toolkit.checkpoint.weights import PackedSlice  # noqa: E402
from toolkit.errors import ModelError  # noqa: E402
from toolkit.families import GGUF_NEEDS_CONFIG, GGUF_READ, GGUF_TAKES_FOR_GRANTED  # noqa: E402

__all__ = ["main"]

PARAMETERS, LOGITS = 1e-6, 1e-5
"""Largest differences: a norm is stored with one added, a decay as an exponential; state spaces sum in chunks."""

UNUSUAL: dict[str, Any] = {
    **dict.fromkeys(("routed_scaling_factor", "route_scale"), 1.7),
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "layer_norm_epsilon"), 3e-4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 3),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 2),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "use_qk_norm"), True),
    "qkv_bias": False,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
    "sliding_window": 5,
    "n_group": 2,
    "topk_group": 1,
    "v_head_dim": 12,
    "moe_intermediate_size": 40,
    "linear_num_value_heads": 8,
    "mlp_layer_types": ["dense", "dense", "sparse"],
}
"""Fields, where a config has them and a value for them."""
THETA = 7777.0

USUAL: dict[str, tuple[str, ...]] = {
    "lfm2_moe": ("routed_scaling_factor",),  # not in the file
    "olmoe": ("rms_norm_eps",),  # always 1e-5 in the file
    **dict.fromkeys(("mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "dots1", "nemotron_h"), ("sliding_window",)),
    **dict.fromkeys(("afmoe", "gpt_oss", "granitemoehybrid", "minimax_m2"), ("attention_bias",)),
}
"""Fields that keep their default: the converter writes none of them, or has no name for the tensors that they add."""

OWN: dict[str, dict[str, Any]] = {
    **GGUF_TAKES_FOR_GRANTED,
    "afmoe": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "mup_enabled": True,
    },
    "dots1": {"norm_topk_prob": True},
    "granitemoehybrid": {"shared_intermediate_size": 20},
    "granitemoeshared": {"shared_intermediate_size": 20},
    "minimax_m2": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "nemotron_h": {"num_experts_per_tok": 2},
    "solar_open": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
}
"""What a family needs besides: what llama.cpp takes for granted, and what its published models have."""

OLDER: dict[str, dict[str, Any]] = {
    "gemma4_text": {"global_head_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_moe": {"moe_intermediate_size": [40] * 3, "moe_topk": [3] * 3, "num_shared_expert": [1] * 3},
    "kimi_linear": {
        "linear_attn_config": {"full_attn_layers": [3], "short_conv_kernel_size": 4, "head_dim": 16},
        "first_k_dense_replace": 2,
    },
    "mimo_v2_flash": {
        "swa_head_dim": 16,
        "swa_v_head_dim": 12,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "hybrid_layer_pattern": [0, 1, 1],
        "rope_parameters": {"partial_rotary_factor": 0.334, "rope_theta": 5e6},
        "topk_method": "noaux_tc",
    },
    "minimax_m2": {"rotary_dim": 8},
    "mistral4": {"architectures": ["Mistral3ForConditionalGeneration"]},
    "phimoe": {"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 128},
}
"""Fields of published configs that the converter asks for, and transformers 5 no longer writes or writes otherwise."""


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    options = family_parser(__doc__, ROOT / ".venv-llama").parse_args(arguments)
    warnings.simplefilter("ignore")
    python, converter = other_side(options.venv)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        models = {}
        for name in options.families or [name for known in sorted(GGUF_READ) for name in model_types(known)]:
            folder = Path(scratch) / name / "base"
            _save(name, folder)
            models[name] = {"base": str(folder), "merged": None, "settings": OLDER.get(name, {})}
        job = {"converter": str(converter), "tokens": TOKENS, "out": scratch, "models": models}
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(job))
        for verb in ("convert", "blocks"):
            side = [python, str(Path(__file__).with_name("llama_side.py")), verb, str(path)]
            subprocess.run(side, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name, files in models.items():
            rows[name] = _row(name, Path(str(files["base"])), Path(scratch) / f"{name}.json")
            print(name, rows[name], file=sys.stderr, flush=True)
        wrong = _blocks(Path(scratch) / "blocks.npz")
    return max(_printed(rows, options.json), wrong)


def _save(name: str, folder: Path) -> None:
    """The checkpoint, with what the converter wants of one family or another."""
    build(_unusual(name)).save_pretrained(folder)
    shutil.copy(NANO / "tokenizer.json", folder)  # one counts its entries, to cut the embedding
    if name == "kimi_linear":  # transformers 5.23 writes dense layers under the name of sparse ones
        tensors = load_file(folder / "model.safetensors")
        dense = re.compile(r"\.block_sparse_moe\.((gate|up|down)_proj)")
        save_file({dense.sub(r".mlp.\1", key): value for key, value in tensors.items()}, folder / "model.safetensors")


def _unusual(name: str) -> PretrainedConfig:
    config = tiny_config(name)
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    for key, value in UNUSUAL.items():
        if fields.get(key) is not None and key not in USUAL.get(name, ()):
            fields[key] = value
    fields |= OWN.get(name, {})
    if "rope_theta" in (tiny_config(name).to_dict().get("rope_parameters") or {}):
        fields["rope_parameters"] = {**fields["rope_parameters"], "rope_theta": THETA}
    return type(config)(**fields)


def _row(name: str, folder: Path, failed: Path) -> dict[str, Any]:
    if failed.is_file():
        return {"not read": json.loads(failed.read_text())["base"]}
    file = Path(f"{folder}.gguf")
    if any(is_named(name, known) for known in GGUF_NEEDS_CONFIG):
        file = file.rename(folder / file.name)
    try:
        found = read_gguf(file)
    except ModelError as error:
        return {"not read": str(error).partition(": ")[2]}
    original = auto_class(_unusual(name)).from_pretrained(folder, dtype=torch.float32).eval()
    ours = _loaded(found)
    state, there = original.state_dict(), ours.state_dict()
    differences = [float((there[key] - state[key]).abs().max()) for key in found.weights]
    with torch.no_grad():
        wanted, logits = original(torch.tensor([TOKENS])).logits, ours(torch.tensor([TOKENS])).logits
    return {
        "architecture": found.architecture,
        "read as": found.config.model_type,
        "parameters": len(differences),
        "to the bit": differences.count(0.0),
        "others": max(differences),
        "logits": float((logits - wanted).abs().max() / wanted.std()),
    }


@torch.no_grad()
def _loaded(found: GgufCheckpoint) -> PreTrainedModel:
    model: PreTrainedModel = auto_class(found.config).from_config(found.config, dtype=torch.float32).eval()
    state = model.state_dict()
    for name, weight in found.weights.items():
        state[name].copy_(PackedSlice(weight, found.slices)[...].read())
    return model


def _blocks(path: Path) -> int:
    """Print how many block types are worth what ggml says; 1 where one is not."""
    with np.load(path) as there:
        kinds = [key.removeprefix("blocks ") for key in there.files if key.startswith("blocks ")]
        read = [kind for kind in kinds if kind in GGMLQuantizationType.__members__ and can_multiply_out(kind)]
        ours = {kind: multiply_out(torch.from_numpy(there[f"blocks {kind}"]), kind).numpy() for kind in read}
        same = [kind for kind in read if np.array_equal(ours[kind], there[f"values {kind}"])]
    others = ", ".join(sorted(set(kinds) - set(read))) or "none"
    print(f"{len(same)} of {len(read)} block types are worth what ggml's C code says, to the bit; not read: {others}\n")
    return int(same != read)


def _printed(rows: dict[str, dict[str, Any]], path: Path | None) -> int:
    if path:
        path.write_text(json.dumps(rows, indent=2, sort_keys=True))
    print("| family | architecture | parameters | to the bit | others | logits |\n|---|---|---:|---:|---:|---:|")
    bad = []
    for name, row in rows.items():
        if "not read" in row:
            bad.append(name)
            continue
        bad += [name] if row["others"] > PARAMETERS or row["logits"] > LOGITS else []
        cells = f"{row['parameters']} | {row['to the bit']} | {row['others']:.0e} | {row['logits']:.0e}"
        print(f"| {name} | {row['architecture']} | {cells} |")
    for name, row in rows.items():
        if "not read" in row:
            print(f"- {name}: {row['not read']}")
    read = {row["architecture"] for row in rows.values() if "architecture" in row}
    print(
        f"\n{len(rows) - len(bad)} of {len(rows)} families come back, {len(read)} of {len(GGUF_READ)} architectures; "
        f"not or too far off: {', '.join(bad) or 'none'}"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
