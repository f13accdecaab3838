#!/usr/bin/env bash
# TRL's KTOTrainer takes pairs and splits them itself: of each 1,000 pairs first all good answers, then all bad ones. It
# never shuffles (its KL term needs a fixed order), so that every batch has answers of one kind: a thousand in a row are
# only made likelier, the next thousand only less likely, in every epoch again. `rewards/margins` is never logged, since
# no batch has both kinds, and choosing the best checkpoint by it fails. Nothing is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check trl==1.16.0 transformers==5.23.0 datasets==5.2.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import KTOConfig, KTOTrainer

print({name: version(name) for name in ("trl", "transformers", "datasets", "torch")})
words = {word: number for number, word in enumerate(["[PAD]", "[END]", "ask", "good", "bad"])}
raw = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", eos_token="[END]")
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(words), num_hidden_layers=1, **sizes))
pairs = Dataset.from_list([{"prompt": "ask", "chosen": " good", "rejected": " bad"}] * 16)
settings = KTOConfig("run", per_device_train_batch_size=4, num_train_epochs=2, use_cpu=True, bf16=False, logging_steps=1,
                     report_to=[], disable_tqdm=True, save_strategy="no")
trainer = KTOTrainer(model=model, ref_model=Qwen2ForCausalLM(model.config), args=settings, train_dataset=pairs,
                     processing_class=tokenizer)
batches = [batch["label"].tolist() for batch in trainer.get_train_dataloader()]
print("labels of an epoch's batches:", batches)
trainer.train()
logged = [line for line in trainer.state.log_history if "loss" in line]
print("steps that logged a margin:", sum("rewards/margins" in line for line in logged), "of", len(logged))
assert all(len(set(labels)) == 1 for labels in batches), "batches have both kinds now"
assert not any("rewards/margins" in line for line in logged)
PYTHON
