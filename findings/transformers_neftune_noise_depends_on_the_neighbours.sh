#!/usr/bin/env bash
# NEFTune adds noise to the embeddings of a row in training: alpha divided by the root of the row's length times the width, so
# that the noise of a row as a whole has one size. transformers 5.23.0 (neftune_noise_alpha of Trainer and of TRL) takes the
# length of the batch for that of the row:
# - a row of 64 tokens, padded to a neighbour of 4,096, has an eighth of the noise that it has alone;
# - with rows laid end to end (DataCollatorWithFlattening; packing in TRL) the batch is one row, and the noise falls by the
#   root of the number of rows in it: a larger batch has less noise.
# And the hook sits behind the embedding. Gemma's multiplies by the root of the width there, after which the noise is, beside
# it, smaller by that root, 45 at a width of 2,048: nothing. Nothing is said in any of these cases.
# Follows: an alpha that helped without packing is next to no noise with it. Multiply alpha by the root of the rows in a
# batch, and for Gemma by the root of the width; group rows by length.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 accelerate==1.15.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
import transformers
from transformers import (
    DataCollatorWithFlattening, Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM, Trainer,
    TrainingArguments,
)

print({name: version(name) for name in ("transformers", "accelerate", "torch")})
transformers.logging.set_verbosity_error()
sizes = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32,
}


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def noise(model, lengths, collator=padded):
    """The noise of the first row's embeddings in a step of Trainer, as a share of the embeddings themselves."""
    seen = []
    embedding = model.get_input_embeddings()
    forward = embedding.forward
    embedding.forward = lambda ids: seen.append(forward(ids)) or seen[-1]  # before NEFTune's hook
    model.model.layers[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    settings = TrainingArguments(
        "run", neftune_noise_alpha=5.0, max_steps=1, per_device_train_batch_size=len(lengths), report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )
    rows = [{"input_ids": [1 + number % 63 for number in range(length)]} for length in lengths]
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=collator)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    before, after = (states.detach()[0, : lengths[0]] for states in seen[:2])
    return float((after - before).norm() / before.norm())


def small(kind):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**sizes)) if kind == "qwen3" else Gemma3ForCausalLM(Gemma3TextConfig(**sizes))


found = {
    "alone": noise(small("qwen3"), [64]),
    "padded to 4096": noise(small("qwen3"), [64, 4096]),
    "16 rows side by side": noise(small("qwen3"), [64] * 16),
    "16 rows end to end": noise(small("qwen3"), [64] * 16, DataCollatorWithFlattening()),
    "alone, Gemma 3": noise(small("gemma3"), [64]),
}
for told, share in found.items():
    print(f"a row of 64 tokens, {told}: the noise is {share:.4f} of the embeddings")
alone = found["alone"]
assert abs(found["16 rows side by side"] / alone - 1) < 0.1
assert abs(found["padded to 4096"] / alone - 1 / 8) < 0.02
assert abs(found["16 rows end to end"] / alone - 1 / 4) < 0.03
assert abs(found["alone, Gemma 3"] / alone - 1 / 8) < 0.02, "the root of a width of 64"
print("seen: the noise of a row depends on what it is batched with, and on the embedding's factor")
PYTHON
