#!/usr/bin/env bash
# A run that is made longer: transformers 5.23's Trainer, told to go on from the last checkpoint of a finished run with
# more steps, takes the first new step at the rate with which the old schedule ended, which is 0. The rate comes out of
# the saved optimizer's groups; the new schedule, over all steps, is asked only after that step. So the longer run has
# one step less than it says, and each further extension costs one more. Nothing is logged but that learning rate.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import Trainer, TrainingArguments

print({name: version(name) for name in ("torch", "transformers", "accelerate")})


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels):
        return {"loss": (self.weight * x - labels).square().mean()}


def trained(steps, **go_on):
    torch.manual_seed(0)
    rows = [{"x": torch.ones(1), "labels": torch.ones(1)} for _ in range(8)]
    given = {"max_steps": steps, "save_steps": 4, "logging_steps": 1, "lr_scheduler_type": "linear", "warmup_steps": 0}
    arguments = TrainingArguments("run", learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True, **given)
    trainer = Trainer(Line(), arguments, train_dataset=rows)
    trainer.train(**go_on)
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


first = trained(4)
longer = trained(8, resume_from_checkpoint=True)
print("rates, four steps then eight:", longer)
print("rates of eight steps at once:", [0.1 * (1 - step / 8) for step in range(8)])
assert longer[:4] == first
assert longer[4] == 0.0, "the first new step has the new schedule's rate"
assert longer[5] > 0
PYTHON
