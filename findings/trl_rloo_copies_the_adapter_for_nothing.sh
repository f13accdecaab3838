#!/usr/bin/env bash
# TRL 1.16.0's RLOOTrainer copies the adapter of a PEFT model into a second one, "ref", to compare answers with it; also
# with beta=0, where nothing is compared (its GRPOTrainer has no copy then). The copy is never used, never trained, takes
# the adapter's memory again, and `save_model` writes it beside the adapter. Where PEFT cannot add a second adapter of
# the configuration, training fails for a copy that nobody needs.
# Follows: delete the adapter "ref" once the trainer is made, or whatever counts adapters counts twice.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 trl==1.16.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 CI=1 venv/bin/python - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

print({name: version(name) for name in ("trl", "peft", "transformers", "torch")})
words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="a"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
config = Qwen2Config(vocab_size=4, hidden_size=8, intermediate_size=8, **sizes)


def adapters(trainer, arguments):
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    made = trainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments(
            "out", beta=0.0, num_generations=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a b"] * 4}),
        processing_class=tokenizer,
    )
    made.save_model("saved")
    return list(made.model.peft_config), Path("saved/ref").is_dir()


grpo, rloo = adapters(GRPOTrainer, GRPOConfig), adapters(RLOOTrainer, RLOOConfig)
print("GRPO, beta 0: adapters", grpo[0])
print("RLOO, beta 0: adapters", rloo[0], "and a saved copy" if rloo[1] else "")
assert grpo[0] == ["default"]
assert rloo == (["default", "ref"], True), "it makes no copy now"
PYTHON
