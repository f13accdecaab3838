#!/usr/bin/env bash
# TRL cannot train rows of the output head by PEFT's trainable tokens: SFTTrainer ends with an AttributeError at its first step.
#
# trl 1.16.0 with peft 0.21.2 (transformers 5.23.0). TRL's fused head reads `lm_head.weight` and `lm_head.bias`. PEFT puts a
# `TrainableTokensWrapper` in the head's place wherever `trainable_token_indices` reaches it: where a model ties its head to
# its embedding, that is always so. While an adapter is active the wrapper hands on `weight` and nothing else, so that asking
# for `bias` raises, though the linear inside has one (None). The loss by plain logits works.
#
# onecard gives the wrapper a parameter `bias` of None (toolkit/adapters/tokens.py).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2" "trl==1.16.0"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config
from trl.trainer.utils import add_fused_lm_head

print({name: version(name) for name in ("torch", "transformers", "peft", "trl")})
config = Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
)
model = AutoModelForCausalLM.from_config(config)
add_fused_lm_head(model)  # as SFTTrainer does
adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[62, 63]))
ids = torch.tensor([[1, 62, 2, 63, 3]])
print("by plain logits:", adapted(input_ids=ids, labels=ids).loss.item())
try:
    adapted(input_ids=ids, labels=ids, fused_lm_head=True)
except AttributeError as error:
    print("by TRL's fused head:", error)
else:
    raise SystemExit("the fault is gone")
assert model.lm_head.original_module.bias is None
PY
