#!/usr/bin/env bash
# transformers 5.23.0: a MoE's forward adds router_aux_loss_coef · (its load-balancing loss) to the loss. Trainer has the
# token loss divided by the tokens of all micro-batches, and no more divides the whole by their number; the balancing
# loss is a mean already, and is added once for each. So its weight is router_aux_loss_coef times
# gradient_accumulation_steps: the same 8 rows weigh it 8 times as much in micro-batches of one. The logged loss is too
# large by as much. With label_smoothing_factor it is the other way: Trainer computes its own loss, and the balancing loss
# is in it not at all.
# Follows: how evenly a router is trained changes with how a batch is cut to fit the memory. Divide router_aux_loss_coef
# by the accumulation steps. (TRL's SFTTrainer divides by itself.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

print({name: version(name) for name in ("transformers", "accelerate", "torch")})
row = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(1))
rows = [{"input_ids": row, "labels": row}] * 8  # alike, so that no cut of the batch changes any mean


def step(micro: int, coefficient: float, smoothing: float) -> tuple[torch.Tensor, float]:
    """The router's gradient and the logged loss of one step over the eight rows."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
            output_router_logits=coefficient > 0, router_aux_loss_coef=coefficient,
        )
    )
    arguments = TrainingArguments(
        "run", max_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro, optim="sgd",
        max_grad_norm=1e9, label_smoothing_factor=smoothing, logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, log_level="error",
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    router, found = model.model.layers[0].mlp.gate.weight, {}
    trainer.remove_callback(PrinterCallback)
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: found.update(gradient=router.grad.clone()))
    trainer.train()
    return found["gradient"], trainer.state.log_history[0]["loss"]


def balancing(micro: int, smoothing: float = 0.0) -> tuple[float, float]:
    """What the balancing loss adds to the router's gradient and to the logged loss."""
    (with_it, loss), (without, bare) = (step(micro, coefficient, smoothing) for coefficient in (1.0, 0.0))
    return float((with_it - without).norm()), loss - bare


whole = balancing(8)
for micro in (8, 4, 1):
    gradient, loss = balancing(micro)
    print(f"{8 // micro} micro-batches: gradient {gradient / whole[0]:.2f} times, loss {loss / whole[1]:.2f} times that of one")
    assert abs(gradient / whole[0] - 8 // micro) < 0.05 and abs(loss / whole[1] - 8 // micro) < 0.05
smoothed = balancing(8, smoothing=0.1)
print("with label smoothing:", smoothed)
assert smoothed == (0.0, 0.0) and whole[0] > 0.01
print("seen: the load-balancing loss is weighed by the number of micro-batches, and left out beside label smoothing")
PYTHON
