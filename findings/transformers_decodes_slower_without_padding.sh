#!/usr/bin/env bash
# transformers 5.23 hands SDPA a decoding step in one of two ways, where heads share keys. With a mask, the heads that
# share keys become rows of one head. Without one, it sets `enable_gqa=True`, which is right for a card: on a CPU torch
# then takes head after head, in bf16 several times slower. And the mask is left out as soon as no prompt of the batch is
# padded. So a batch of prompts of equal length decodes slower than the same prompts with one token of padding in front
# of one of them, the more so the longer the text; the answers are the same.
# Follows: compare decoding with and without padding before tuning anything else, or give the mask by hand.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import time
from importlib.metadata import version

import torch
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

print("torch", version("torch"), "transformers", version("transformers"), torch.backends.cpu.get_cpu_capability())
torch.manual_seed(0)
torch.set_grad_enabled(False)
torch.set_num_threads(1)
sizes = {"hidden_size": 512, "head_dim": 64, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 500}
config = Qwen3MoeConfig(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, **sizes)
model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
prompts = torch.randint(1, 500, (8, 400))


def step(padded):
    """Least seconds of a decoding step after these prompts, and the logits of the last one."""
    mask = torch.ones_like(prompts)
    if padded:
        mask[0, 0] = 0
    cache, times = DynamicCache(config=config), []
    model(input_ids=prompts, attention_mask=mask, past_key_values=cache, use_cache=True)
    for token in range(1, 8):
        mask = torch.cat([mask, torch.ones(8, 1, dtype=mask.dtype)], 1)
        began = time.process_time()
        found = model(
            input_ids=torch.full((8, 1), token), attention_mask=mask, past_key_values=cache, use_cache=True
        )
        times.append(time.process_time() - began)
    return min(times), found.logits.float()


step(True)
(with_mask, padded), (without, plain) = step(True), step(False)
apart = (padded[1:] - plain[1:]).abs().max() / plain.abs().max()
print(f"one token of padding: {with_mask * 1e3:.1f} ms a step; none: {without * 1e3:.1f} ms, {without / with_mask:.1f} times as long")
print(f"logits of the prompts that are the same: {apart:.1e} of the largest apart")
assert apart < 0.05
assert without > 2 * with_mask, "no padding is no longer slower"
PYTHON
