#!/usr/bin/env bash
# mergekit 0.1.5: mergekit-moe with gate_mode "hidden_avg" makes the router's row of an expert from the hidden states of
# its positive prompts, averaged over each prompt's tokens. It pads the prompts to one length with the start-of-text
# token, and counts the padding as tokens: a prompt of two words beside one of 26 is nine parts padding. What all
# experts' rows then share is the hidden state of the start of a text, and what the short prompts are about is gone from
# them. The row of both prompts is no mixture of the rows of each, as a mean is. Nothing is said. Mode "hidden", which
# takes the last token, is right, and "cheap_embed" masks the padding. (transformers 5.23.0.)
# Follows: routing depends on the length of the longest prompt. Give prompts of equal length, or use another mode.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 mergekit==0.1.5
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print({name: version(name) for name in ("mergekit", "transformers", "torch")})
words = ["<s>", "</s>", *(f"w{index}" for index in range(60))]
plain = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
config = LlamaConfig(
    vocab_size=62, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, initializer_range=0.3,
)
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained("base")
tokenizer.save_pretrained("base")
names = ("one", "two", "both", "four")
for name in names:
    shutil.copytree("base", name)
short, long, equal = "w1 w2", " ".join(f"w{index}" for index in range(3, 29)), "w30 w31"


def outside(mode, second):
    """How much of the row of both prompts is no mixture of the rows of each, in each layer; a mean is one."""
    prompts = ([short], [second], [short, second], ["w40 w41"])
    experts = [{"source_model": name, "positive_prompts": told} for name, told in zip(names, prompts)]
    told = {"base_model": "base", "gate_mode": mode, "dtype": "float32", "architecture": "mixtral", "experts": experts}
    Path("moe.yml").write_text(json.dumps(told))
    shutil.rmtree("moe", ignore_errors=True)
    ran = subprocess.run(["mergekit-moe", "moe.yml", "moe", "--device", "cpu"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    tensors = load_file(next(Path("moe").glob("*.safetensors")))
    shares = []
    for layer in range(config.num_hidden_layers):
        one, two, both, _ = tensors[f"model.layers.{layer}.mlp.gate.weight"].float()
        span = torch.stack((one, two), 1)
        mixture = span @ torch.linalg.lstsq(span, both[:, None]).solution
        shares.append(float((both - mixture[:, 0]).norm() / both.norm()))
    return shares


found = {}
for mode in ("hidden_avg", "hidden"):
    for label, second in (("26 words", long), ("2 words", equal)):
        found[mode, label] = outside(mode, second)
        print(f"{mode}, 2 words beside {label}: outside of any mixture, by layer", [f"{x:.3f}" for x in found[mode, label]])
assert all(share > 0.25 for share in found["hidden_avg", "26 words"])
assert all(max(found[key]) < 0.02 for key in found if key != ("hidden_avg", "26 words"))
print("seen: with prompts of unequal length the mean of their hidden states has something else in it: padding")
PYTHON
