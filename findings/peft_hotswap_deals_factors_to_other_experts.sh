#!/usr/bin/env bash
# peft 0.21.2: hotswap_adapter puts another adapter's tensors in the place of those that are there. Where the new rank is
# smaller, it writes them to the first rows and columns and fills up with zeros. That is right for a linear. In the
# factors of an expert stack (target_parameters) the rows of A go expert by expert: with half the rank, the first half of
# the experts gets the rows of all of them, two experts' in each, and the other half gets zeros; B, whose columns go rank
# by rank, is as it should be. So the experts compute with one another's factors. Nothing is raised. (transformers 5.23.0;
# with equal ranks the swap is right.)
# Follows: a server that swaps adapters of several ranks on a MoE answers nonsense with some of them. Load each as an
# adapter of its own, or bring all to one rank first, expert by expert.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

print({name: version(name) for name in ("peft", "transformers", "torch")})
tokens = torch.arange(8)[None]


def made():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=32, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        )
    ).eval()


TARGETS = {
    "linears": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}
for kind, targets in TARGETS.items():
    for rank in (8, 4):
        model = get_peft_model(made(), LoraConfig(r=rank, lora_alpha=2 * rank, **targets))
        torch.manual_seed(rank)
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.data.normal_(std=0.2)
        model.save_pretrained(f"{kind}-{rank}")


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens).logits


found = {}
for kind in TARGETS:
    for first, then in ((8, 8), (8, 4)):
        wanted = logits(PeftModel.from_pretrained(made(), f"{kind}-{then}"))
        swapped = PeftModel.from_pretrained(made(), f"{kind}-{first}")
        if first == then:  # the same adapter again, after its factors were wiped
            for name, value in swapped.named_parameters():
                if ".lora_" in name:
                    value.data.zero_()
        hotswap_adapter(swapped, f"{kind}-{then}", adapter_name="default", torch_device="cpu")
        found[kind, then] = float((logits(swapped) - wanted).norm() / (wanted - logits(made())).norm())
        print(f"{kind}, rank {first} swapped for rank {then}: off by {found[kind, then]:.1%} of what the adapter changes")
        if (kind, then) == ("experts", 4):
            wrapper = swapped.base_model.model.model.layers[0].mlp.experts
            rows = wrapper.lora_A["default"].weight.reshape(4, 8, -1).abs().sum(-1).count_nonzero(1).tolist()
            print("rows of A that are not zero, by expert (4 each would be right):", rows)
            assert rows == [8, 8, 0, 0]
assert found["experts", 4] > 0.2
assert all(off < 1e-4 for key, off in found.items() if key != ("experts", 4))
print("seen: a swap to a smaller rank deals the experts' factors out to the wrong experts")
PYTHON
