#!/usr/bin/env bash
# datasets 5.2.0: a stream (IterableDataset) is split by take(n) for evaluation and skip(n) for training, and the guide tells to
# shuffle before that. In the first epoch the two are disjoint. Then Trainer calls set_epoch on the training part, as it
# should for a new order; the shuffle that lies under both takes the epoch into its seed; and skip(n) now leaves out the
# first n of another order. The evaluation part, whose epoch nobody sets, stays what it was. So from the second epoch on
# evaluation rows are trained on (here 47 of 100 in each epoch, 88 within four), and other rows are left out for them.
# Nothing is said, and eval_loss falls. (transformers 5.23.0; the same with torch's DataLoader and set_epoch.)
# Follows: a held-out loss over several epochs of a shuffled stream is partly a training loss. Split first, in the order of
# the files, and shuffle the training part after that, or stop after one epoch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 transformers==5.23.0 accelerate==1.15.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
import transformers
from datasets import Dataset
from transformers import Trainer, TrainingArguments

print({name: version(name) for name in ("datasets", "transformers", "accelerate", "torch")})
transformers.logging.set_verbosity_error()
rows, held_out, epochs = 1000, 100, 4
seen = {}


class Watch(torch.nn.Module):
    """A model that notes which rows it is trained on and evaluated on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, number, labels):
        seen.setdefault("train" if self.training else "eval", []).append(set(number.tolist()))
        return {"loss": (self.weight - labels.float()).square().mean()}


def run(shuffle_first):
    """The rows of training in each epoch and the rows of evaluation."""
    seen.clear()
    numbers = {"number": list(range(rows)), "labels": [0] * rows}
    stream = Dataset.from_dict(numbers).to_iterable_dataset(num_shards=4)
    if shuffle_first:
        stream = stream.shuffle(seed=0, buffer_size=200)
    evaluation, training = stream.take(held_out), stream.skip(held_out)
    if not shuffle_first:
        training = training.shuffle(seed=0, buffer_size=200)
    steps = (rows - held_out) // 10
    settings = TrainingArguments(
        "run", per_device_train_batch_size=10, per_device_eval_batch_size=10, max_steps=steps * epochs, eval_strategy="steps",
        eval_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
        remove_unused_columns=False,
    )
    Trainer(Watch(), settings, train_dataset=training, eval_dataset=evaluation).train()
    trained = [set().union(*seen["train"][epoch * steps : (epoch + 1) * steps]) for epoch in range(epochs)]
    return trained, set().union(*seen["eval"])


for told, shuffle_first in (("shuffled, then split", True), ("split, then shuffled", False)):
    trained, evaluated = run(shuffle_first)
    shares = [len(evaluated & epoch) / len(evaluated) for epoch in trained]
    union = len(evaluated & set().union(*trained)) / len(evaluated)
    print(
        f"{told}: {len(evaluated)} rows are evaluated; trained on in each of {epochs} epochs: "
        + ", ".join(f"{share:.0%}" for share in shares) + f", in one of them: {union:.0%}"
    )
    if shuffle_first:
        assert len(evaluated) == held_out and shares[0] == 0 and min(shares[1:]) > 0.2 and union > 0.5
    else:
        assert union == 0
print("seen: from the second epoch on the held-out rows are trained on")
PYTHON
