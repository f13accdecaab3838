#!/usr/bin/env bash
# axolotl 0.19.0's `merge-lora` (its default way, shard by shard) goes over the base's tensors and looks for lora_A and lora_B of
# each. PEFT has more in an adapter: the rows of the embedding that peft_trainable_token_indices trains
# (token_adapter.trainable_tokens_delta), and the factors of an embedding among lora_target_modules (lora_embedding_A and
# lora_embedding_B). Neither is looked for: the merged model has the base's embedding, untrained new tokens included. The
# command ends as usual and tells that it merged so many tensors; methods that it does not know (AdaLoRA, VeRA, PiSSA) it
# refuses. PEFT's own merge, behind `merge_method: legacy`, has all of it.
# Follows: a model that was taught new tokens loses just them when it is merged. Use merge_method: legacy.
# (The module is run alone: the whole package needs libraries for a card. transformers and peft as axolotl pins them.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps axolotl==0.19.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.16.1 peft==0.20.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import importlib.util
import logging
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

print({name: version(name) for name in ("axolotl", "peft", "transformers", "torch")})
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
file = Path(importlib.util.find_spec("axolotl").submodule_search_locations[0]) / "cli" / "utils" / "lora_merge.py"
spec = importlib.util.spec_from_file_location("lora_merge", file)
merging = importlib.util.module_from_spec(spec)
spec.loader.exec_module(merging)
said = []


class Kept(logging.Handler):
    def emit(self, record):
        said.append((record.levelname, record.getMessage()))


(merging.LOG.logger if hasattr(merging.LOG, "logger") else merging.LOG).addHandler(Kept())
torch.manual_seed(0)
base = Qwen3ForCausalLM(Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    head_dim=16, tie_word_embeddings=False,
))
base.save_pretrained("base")
tokens = torch.arange(64)[None]


def lost(**options):
    """What PEFT's and axolotl's merges lose, as a share of what training changed, and what the adapter holds."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=4, task_type="CAUSAL_LM", **options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("adapter")
    shutil.rmtree("merged", ignore_errors=True)
    merging.merge_lora_sharded_efficient("base", "adapter", "merged")
    with torch.no_grad():
        trained, untrained = model.eval()(input_ids=tokens).logits, base(input_ids=tokens).logits
        by_peft = model.merge_and_unload()(input_ids=tokens).logits
        by_axolotl = AutoModelForCausalLM.from_pretrained("merged")(input_ids=tokens).logits
    names = list(safe_open("adapter/adapter_model.safetensors", "pt").keys())
    shares = [float((logits - trained).norm() / (trained - untrained).norm()) for logits in (by_peft, by_axolotl)]
    return *shares, sorted({name.split("model.model.")[-1] for name in names if "embed" in name})


results = {}
for told, options in (
    ("linear layers alone", {"target_modules": ["q_proj", "down_proj"]}),
    ("and five tokens", {"target_modules": ["q_proj", "down_proj"], "trainable_token_indices": [59, 60, 61, 62, 63]}),
    ("and the embedding", {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}),
):
    results[told] = lost(**options)
    by_peft, by_axolotl, names = results[told]
    print(f"{told}: PEFT's merge loses {by_peft:.4f} of what was trained, axolotl's {by_axolotl:.4f}; of the embedding: {names}")
assert all(by_peft < 1e-4 for by_peft, _, _ in results.values())
assert results["linear layers alone"][1] < 1e-4
assert results["and five tokens"][1] > 0.1 and results["and the embedding"][1] > 0.1
print("the last of what axolotl says:", said[-1])
assert not any(level in ("WARNING", "ERROR") for level, _ in said)
print("seen: the trained tokens and the embedding's adapter are not in the merged model")
PYTHON
