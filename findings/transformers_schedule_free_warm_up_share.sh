#!/usr/bin/env bash
# transformers hands a share of warm-up steps to schedule-free optimizers as it is, and the first step is taken at a rate many times
# the one that was asked for.
#
# transformers 5.23.0 with schedulefree 1.4.1. `warmup_steps` below 1 is documented as a share of all steps; warmup_ratio is gone.
# Schedules turn it into steps. `schedule_free_adamw` gets the share itself, and divides by it: its first rate is (0 + 1) / 0.05
# times the peak. Nothing is logged: the logged rate is that of the constant schedule.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0" "schedulefree==1.4.1"
cd "$work"
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from transformers import Trainer, TrainingArguments

print({name: version(name) for name in ("torch", "transformers", "schedulefree")})


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels):
        return {"loss": (self.weight * x - labels).square().mean()}


def first_rate(warmup_steps):
    rows = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 100
    given = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 1e-3, "max_steps": 100}
    arguments = TrainingArguments(
        "run", warmup_steps=warmup_steps, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **given
    )
    rates = []
    trainer = Trainer(Line(), arguments, train_dataset=rows)
    step = type(trainer.create_optimizer()).step  # the schedule-free optimizer itself
    wrapped = trainer.optimizer

    def watched(*a, **k):
        found = step(wrapped, *a, **k)
        rates.append(wrapped.param_groups[0]["scheduled_lr"])
        return found

    wrapped.step = watched
    trainer.train()
    return rates[0]


share, whole = first_rate(0.05), first_rate(5)
print(f"first rate with warmup_steps=0.05 of 100 steps: {share:g}; with warmup_steps=5: {whole:g}; asked for at most 0.001")
assert abs(whole - 1e-3 / 5) < 1e-9
assert abs(share - 1e-3 / 0.05) < 1e-9, "the share is turned into steps"
PY
