#!/usr/bin/env bash
# transformers 5.23.0's Trainer takes eval_loss as the mean over those batches whose loss is finite. Batches with nan or inf
# are left out, and nothing is logged of it: neither that there were any nor how many. It hangs on logging_nan_inf_filter,
# which is on by default and is documented for the logged training loss. So a model that breaks on seven of eight rows, as
# an overflow in fp16 does on some texts, has the eval_loss of the eighth. Where breaking rows are the hard ones, it falls
# while the model gets worse: such a checkpoint beats a sound one under load_best_model_at_end, early stopping and a search.
# Only where no batch at all is finite it is nan.
# Follows: a good eval_loss does not say that the model is whole. Set logging_nan_inf_filter=False, or ask for the losses
# (include_for_metrics=["loss"]) and count.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 accelerate==1.15.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
from importlib.metadata import version

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

print({name: version(name) for name in ("transformers", "accelerate", "torch")})
said = []


class Kept(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


transformers.logging.set_verbosity_info()
transformers.logging.get_logger("transformers").addHandler(Kept())
sizes = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
}
torch.manual_seed(0)
rows = [{"input_ids": torch.randint(1, 56, (16,))} for _ in range(8)]
easy = torch.arange(56, 64).repeat(2)  # a row that has words of its own, and that the broken model knows well
rows[0]["input_ids"] = easy


def collate(given):
    ids = torch.stack([row["input_ids"] for row in given])
    return {"input_ids": ids, "labels": ids.clone()}


def evaluated(model, **options):
    settings = TrainingArguments(
        "run", per_device_eval_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True, fp16=False, bf16=False, **options
    )
    return Trainer(model, settings, eval_dataset=rows, data_collator=collate).evaluate()["eval_loss"]


sound = Qwen3ForCausalLM(Qwen3Config(**sizes))
broken = Qwen3ForCausalLM(Qwen3Config(**sizes))
broken.load_state_dict(sound.state_dict())
optimizer = torch.optim.AdamW(broken.parameters(), lr=1e-2)
for _ in range(60):
    broken(input_ids=easy[None], labels=easy[None]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
with torch.no_grad():
    broken.get_input_embeddings().weight[:56] = float("inf")  # as after an overflow, for all words but the easy row's
found = {"sound": evaluated(sound), "broken": evaluated(broken)}
counted = evaluated(broken, logging_nan_inf_filter=False)
with torch.no_grad():
    losses = [float(broken(input_ids=row["input_ids"][None], labels=row["input_ids"][None]).loss) for row in rows]
print("losses of the eight rows under the broken model:", [round(loss, 3) for loss in losses])
print(f"eval_loss: sound {found['sound']:.3f}, broken {found['broken']:.3f}, broken with logging_nan_inf_filter=False {counted}")
assert sum(loss == loss and loss != float("inf") for loss in losses) == 1
assert found["broken"] < 1 < found["sound"] and counted != counted
assert not any(word in line.lower() for line in said for word in ("nan", "finite", "filter"))
print("seen: the loss of a model that breaks on seven rows of eight is that of the eighth")
PYTHON
