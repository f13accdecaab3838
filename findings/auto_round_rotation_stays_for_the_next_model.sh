#!/usr/bin/env bash
# auto-round 0.16.1: once a model was quantised with rotation_config="hadamard" in a process, the next one is stored with
# rotated weights too, though nobody asked for it and its config has no rotation_config. Nothing is logged.
# Follows: every reader multiplies the rotated weights with inputs that are not, and gets noise. Quantise each model in a
# process of its own. A checkpoint that was written so cannot be told from a right one by its files.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 auto-round==0.16.1 transformers==5.24.0 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1 "$folder/venv/bin/python" - <<'PYTHON' 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
import json
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print({name: version(name) for name in ("auto-round", "torch", "transformers")})
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LEVELS = torch.cat((LEVELS, -LEVELS))
WORDS = Tokenizer(models.WordLevel({f"w{word}": word for word in range(101)}, unk_token="w0"))
ROWS = [torch.randint(3, 100, (1, 32), generator=torch.Generator().manual_seed(row)) for row in range(8)]
LAYER = "model.layers.0.mlp.up_proj"


def error(name: str, **how: object) -> tuple[float, bool]:
    """Relative error of a stored MXFP4 weight, and whether the config tells of a rotation."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=101, num_key_value_heads=4, **sizes)).bfloat16()
    plain = model.get_submodule(LAYER).weight.float().clone()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=WORDS, unk_token="w0", pad_token="w0")
    data = {"dataset": ROWS, "seqlen": 32, "nsamples": 8, "batch_size": 2}
    run = AutoRound(model, tokenizer=tokenizer, scheme="MXFP4", iters=0, disable_opt_rtn=True, **data, **how)
    run.quantize_and_save(name, "auto_round")
    file = next(Path(name).rglob("model.safetensors"))
    stored = load_file(file)
    codes = stored[f"{LAYER}.weight_packed"]
    values = LEVELS[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
    scale = torch.exp2(stored[f"{LAYER}.weight_scale"].float() - 127).repeat_interleave(32, 1)
    told = json.loads((file.parent / "config.json").read_text())["quantization_config"].get("rotation_config")
    return float((values * scale - plain).norm() / plain.norm()), bool(told)


found = [error("first"), error("rotated", rotation_config="hadamard"), error("after")]
for name, (apart, told) in zip(("first", "rotated", "after it"), found, strict=True):
    print(f"{name}: stored weights are off by {apart:.2f} of their norm; config tells of a rotation: {told}")
assert found[0][0] < 0.2 and not found[0][1]
assert found[1][0] > 1 and found[1][1]
assert found[2][0] > 1 and not found[2][1], "the rotation does not stay any more"
PYTHON
