#!/usr/bin/env bash
# transformers 5.23.0's Trainer with label_smoothing_factor computes the loss itself, and has to shift the labels by one for
# models that predict the next token. It looks the model's class up in the table of causal language models. Most
# multimodal chat models are not in that table, though their text part is nothing else: Qwen2.5-VL, Qwen3-VL and its MoE,
# Qwen3.5 and its MoE as ForConditionalGeneration, Mistral 3, Llama 4, LLaVA, InternVL, Idefics, SmolVLM (Gemma 3 is in).
# Their labels are compared with logits that are not shifted: each position is trained to say the token that it has just
# read. The loss falls as in any other run; without smoothing, the model shifts by itself and all
# is right. Text alone is enough, no image is needed. Nothing is raised or logged.
# Follows: such a run turns a model into one that repeats its input. Set label_smoothing_factor to 0 for them.
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
    Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig, Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments,
)

print({name: version(name) for name in ("transformers", "accelerate", "torch")})
transformers.logging.set_verbosity_error()
text = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
picture = {"hidden_size": 32, "intermediate_size": 32}


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**text, head_dim=16))


def mistral3():
    vision = PixtralVisionConfig(**picture, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    texts = MistralConfig(**text, head_dim=16)
    config = Mistral3Config(text_config=texts, vision_config=vision, image_token_index=30)
    return Mistral3ForConditionalGeneration(config)


def qwen2_5_vl():
    turning = {"mrope_section": [2, 3, 3], "rope_type": "default"}
    vision = {"depth": 1, **picture, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_scaling": turning}, vision_config=vision, image_token_id=30, video_token_id=31,
        vision_start_token_id=29, vision_end_token_id=28,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


rows = [[(start + 3 * step) % 28 for step in range(16)] for start in range(28)]  # each token is the last one plus 3
tokens = torch.tensor(rows)


def collate(given):
    batch = torch.tensor([row["input_ids"] for row in given])
    return {"input_ids": batch, "labels": batch.clone()}


results = {}
for make in (qwen3, mistral3, qwen2_5_vl):
    for factor in (0.0, 0.1):
        torch.manual_seed(0)
        model = make()
        settings = TrainingArguments(
            "run", label_smoothing_factor=factor, learning_rate=1e-2, max_steps=100, per_device_train_batch_size=7,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
            lr_scheduler_type="constant",
        )
        Trainer(model, settings, train_dataset=[{"input_ids": row} for row in rows], data_collator=collate).train()
        with torch.no_grad():
            said = model.eval()(input_ids=tokens).logits.argmax(-1)
        following = float((said[:, :-1] == tokens[:, 1:]).float().mean())
        copied = float((said == tokens).float().mean())
        results[make.__name__, factor] = following, copied
        print(f"{type(model).__name__}, smoothing {factor}: {following:.0%} next tokens right, {copied:.0%} copied")
for name in ("qwen3", "mistral3", "qwen2_5_vl"):
    assert results[name, 0.0][0] > 0.95
assert results["qwen3", 0.1][0] > 0.95
for name in ("mistral3", "qwen2_5_vl"):
    assert results[name, 0.1][0] < 0.05 and results[name, 0.1][1] > 0.95
print("seen: with label smoothing they learn to say what they have just read")
PYTHON
