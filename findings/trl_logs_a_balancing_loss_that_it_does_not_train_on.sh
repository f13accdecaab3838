#!/usr/bin/env bash
# TRL 1.16.0's SFTTrainer with label_smoothing_factor on a MoE: it asks the model for its load-balancing loss, logs it as
# `aux_loss` at every step, refuses router_aux_loss_coef on a model that has none, and does not train on it. The loss is
# the smoother's alone: any router_aux_loss_coef gives the same gradients. What is deprecated about label smoothing, says
# TRL, is that it is slow.
# Follows: `aux_loss` in a log does not mean that the router is kept balanced. (transformers 5.23.0.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 CI=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

print({name: version(name) for name in ("trl", "transformers", "torch")})
words = Tokenizer(models.WordLevel({"[PAD]": 0, "[END]": 1}, unk_token="[PAD]"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[END]")
tokens = torch.randint(2, 64, (16,), generator=torch.Generator().manual_seed(1)).tolist()
rows = Dataset.from_list([{"input_ids": tokens}] * 4)


def step(coefficient: float, smoothing: float) -> tuple[torch.Tensor, dict]:
    """The router's gradient and what is logged of one step."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        )
    )
    config = SFTConfig(
        "run", max_steps=1, per_device_train_batch_size=4, optim="sgd", max_grad_norm=1e9, logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, label_smoothing_factor=smoothing,
        router_aux_loss_coef=coefficient,
    )
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    router, found = model.model.layers[0].mlp.gate.weight, {}
    trainer.remove_callback(PrinterCallback)
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: found.update(gradient=router.grad.clone()))
    trainer.train()
    return found["gradient"], trainer.state.log_history[0]


for smoothing in (0.0, 0.1):
    (much, log), (less, other) = step(1.0, smoothing), step(0.001, smoothing)
    apart = float((much - less).norm())
    print(f"label smoothing {smoothing}: aux_loss {log['aux_loss']:.3f} is logged; losses by a coefficient of 1 and of",
          f"0.001: {log['loss']:.4f} and {other['loss']:.4f}; their gradients are {apart:.4f} apart")
    assert log["aux_loss"] > 1
    assert (apart == 0.0 and log["loss"] == other["loss"]) if smoothing else apart > 0.01
print("seen: beside label smoothing the load-balancing loss is logged and not trained on")
PYTHON
