#!/usr/bin/env bash
# peft 0.21.2: adapters that start from the base's own directions (PiSSA, OLoRA, CorDA) are written as plain LoRA adapters by
# save_pretrained(..., path_initial_model_for_weight_conversion=...), so that they fit the untouched base. What is written
# is made of the tensors with "lora_A" or "lora_B" in their name. The factors of an embedding are called
# lora_embedding_A and lora_embedding_B, and DoRA's magnitudes lora_magnitude_vector: they were trained, and they are not
# in the file. Saving says nothing, and adapter_config.json still lists the embedding and use_dora. Who opens the folder
# may see "Found missing adapter keys" among the warnings; by then the run is over. Without conversion all are written.
# Follows: of a run that taught new words by the embedding, or with use_dora, a part is gone. Save it without conversion
# too, and open the converted adapter once before the model is thrown away.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import warnings
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

print({name: version(name) for name in ("peft", "torch", "transformers")})


def converted(start: str, layers: list[str], use_dora: bool = False) -> tuple[float, list[str], list[str]]:
    """The opened adapter's error as a share of what training changed, the tensors in the file, warnings at saving."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Embedding(64, 64), torch.nn.Linear(64, 64, bias=False))
    config = LoraConfig(r=4, lora_alpha=4, target_modules=layers, init_lora_weights=start, use_dora=use_dora)
    model = get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True  # as the documentation tells
    model.save_pretrained("first")
    model.peft_config["default"].init_lora_weights = start
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.arange(64)[None]
    for _ in range(30):
        (model(tokens) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.save_pretrained("converted", path_initial_model_for_weight_conversion="first")
    with torch.no_grad():
        trained, untrained = model.eval()(tokens), base(tokens)
        again = PeftModel.from_pretrained(copy.deepcopy(base), "converted").eval()(tokens)
    names = sorted(safe_open("converted/adapter_model.safetensors", "pt").keys())
    return float((again - trained).norm() / (trained - untrained).norm()), names, [str(line.message) for line in told]


for start in ("pissa", "olora"):
    for told, layers, use_dora in (
        ("a linear layer", ["1"], False), ("a linear layer with DoRA", ["1"], True), ("and the embedding", ["0", "1"], False),
    ):
        error, names, warned = converted(start, layers, use_dora)
        print(f"{start}, {told}: {error:.3f} of what was trained is lost; the file has {[name[17:] for name in names]}")
        assert not any("missing" in line or "magnitude" in line or "embedding" in line for line in warned)
        assert len(names) == 2 and all("1.lora_" in name for name in names)
        assert error < 1e-4 if layers == ["1"] and not use_dora else error > 0.1
print("seen: embeddings and magnitudes are not in the converted adapter")
PYTHON
