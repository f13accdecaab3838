#!/usr/bin/env bash
# PEFT's trainable tokens change what a model computes before anything is trained, where its embedding is more than a lookup.
#
# peft 0.21.2 with transformers 5.23.0. `TrainableTokensLayer` looks rows up by itself (`F.embedding`) and knows of one thing that a
# family's embedding may add, the factor `embed_scale` of Gemma. Muse Spark's embedding normalises what it looks up, and so
# do those of Inkling: with one new token trained, every token of every text goes through without the norm. No warning comes, and
# a fresh adapter, which should change nothing, gives other logits.
#
# onecard refuses new tokens where the embedding has a forward of its own (toolkit/adapters/tokens.py).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkTextNormedEmbedding

print({name: version(name) for name in ("torch", "transformers", "peft")})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = MuseSparkTextNormedEmbedding(64, 32, 0)
        self.q_proj = nn.Linear(32, 32)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.q_proj(self.embed_tokens(ids))


torch.manual_seed(0)
model, ids = Model(), torch.tensor([[5, 6, 7]])
with torch.no_grad():
    model.embed_tokens.weight.mul_(3)
    before = model(ids)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [63]})
    after = get_peft_model(model, config)(ids)
off = (before - after).abs().max().item()
print(f"a fresh adapter changes the output of tokens that it does not train by {off:.2f}, of at most {before.abs().max():.2f}")
assert off > 0.1, "the fault is gone"
PY
