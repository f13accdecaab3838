#!/usr/bin/env bash
# transformers 5.23.0 tells packed texts from their position ids, which begin anew with each text (as DataCollatorWithFlattening
# and TRL's packing give them), and makes a mask that keeps them apart. That is done where the model hands its position ids
# to the mask. gpt-oss does not: its texts see each other, though the same ids turn its queries and keys as if they stood
# alone. (Only with flash attention, which takes the ids itself, they are apart; gpt-oss has eager attention otherwise.)
# And layers that carry a state have no mask: in LFM2-MoE and Qwen3-Next the state of one text runs into the next, though
# their attention is kept apart. (Seen on a CPU, by the code that runs without extra kernels; those of Qwen3-Next take
# cu_seq_lens, which the collator gives only when asked.) Qwen3-MoE, Mixtral and Gemma 3 are right. No message tells; the
# losses look like any others.
# Follows: such models learn to answer from the text before. Before packing, ask whether a text's logits depend on the one
# before it, as here, and build the mask yourself or do not pack.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
import transformers
from transformers import (
    AutoModelForCausalLM, DataCollatorWithFlattening, Gemma3TextConfig, GptOssConfig, Lfm2MoeConfig, MixtralConfig,
    Qwen3MoeConfig, Qwen3NextConfig,
)

print({name: version(name) for name in ("transformers", "torch")})
transformers.logging.set_verbosity_error()
sizes = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}
experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
local = {"num_local_experts": 4, "num_experts_per_tok": 2}
linear = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}
configs = {
    "Qwen3-MoE": Qwen3MoeConfig(**sizes, **experts, head_dim=8),
    "Mixtral": MixtralConfig(**sizes, **local),
    "Gemma 3": Gemma3TextConfig(**sizes, head_dim=8, sliding_window=8),
    "gpt-oss": GptOssConfig(**sizes, **local, head_dim=8, sliding_window=8),
    "LFM2-MoE": Lfm2MoeConfig(**sizes, **experts, layer_types=["conv", "full_attention"]),
    "Qwen3-Next": Qwen3NextConfig(**sizes, **experts, **linear, head_dim=8, layer_types=["linear_attention", "full_attention"]),
}
torch.manual_seed(0)
first, second = torch.randint(3, 60, (11,)).tolist(), torch.randint(3, 60, (9,)).tolist()
rows = [{"input_ids": first, "labels": first}, {"input_ids": second, "labels": second}]
packed = DataCollatorWithFlattening()(rows)
other = {"input_ids": packed["input_ids"].clone(), "position_ids": packed["position_ids"]}
other["input_ids"][0, : len(first)] = torch.randint(3, 60, (len(first),))
found = {}
for name, config in configs.items():
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).train()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([second]), use_cache=False).logits[0]
        logits = [
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, len(first) :]
            for batch in (packed, other)
        ]
    differs, changes = (float((logits[0] - these).norm() / these.norm()) for these in (alone, logits[1]))
    found[name] = differs, changes
    print(
        f"{name} ({model.config._attn_implementation}): the second text differs by {differs:.4f} from the same text alone, "
        f"and by {changes:.4f} as the first is exchanged"
    )
for name, (differs, changes) in found.items():
    if name in ("Qwen3-MoE", "Mixtral", "Gemma 3"):
        assert differs < 1e-4 and changes < 1e-4
    else:
        assert differs > 0.01 and changes > 0.01
print("seen: packed texts see each other in gpt-oss and in families with a state")
PYTHON
