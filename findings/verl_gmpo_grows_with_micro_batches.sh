#!/usr/bin/env bash
# verl 0.9.1 divides a policy loss by the rows or tokens of the whole mini-batch, so that the gradients of micro-batches
# can be added up. All of its losses do so but one: loss_mode "geo_mean" (GMPO) takes the mean over the micro-batch's own
# rows, and the engine adds those up and divides no more. The same 8 rows have a gradient 8 times as large in micro-batches of
# one, while the KL term and the entropy beside it stay as they are. Nothing is logged of it but a larger actor/pg_loss.
# Follows: how a batch is cut to fit the memory decides how KL and reward are weighed, and clipping by norm hides the rest.
# With use_dynamic_bsz the number of micro-batches, and so the weight, changes from step to step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install -q --disable-pip-version-check "$@"; }
pip torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 tensordict==0.15.3 ray==2.60.0 omegaconf==2.4.0 \
    codetiming==1.4.0 numpy==2.4.6 orjson==3.13.0 requests==2.34.2 dill==0.4.1
pip --no-deps verl==0.9.1
cd "$folder"
CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" - <<'PYTHON' 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
from importlib.metadata import version

import torch
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn
from verl.workers.config import ActorConfig

print({name: version(name) for name in ("verl", "torch")})
torch.manual_seed(0)
rows, tokens = 8, 6
old = -torch.rand(rows, tokens)
advantages = torch.randn(rows, 1).expand(rows, tokens).contiguous()
mask = torch.ones(rows, tokens, dtype=torch.bool)


def norm(loss_mode: str, pieces: int) -> float:
    """The gradient's norm over one mini-batch, as verl's engine adds it up: one backward for each micro-batch."""
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, ppo_mini_batch_size=rows)
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=rows, loss_scale_factor=None
    )
    new = old.clone().requires_grad_(True)
    for piece in torch.arange(rows).chunk(pieces):
        common = {"loss_agg_mode": "seq-mean-token-mean"}
        if loss_mode == "kl":
            loss = agg_loss((new - old - 0.1)[piece].square(), mask[piece], **common, **config.global_batch_info)
        else:
            loss, _ = get_policy_loss_fn(loss_mode)(
                old_log_prob=old[piece], log_prob=new[piece], advantages=advantages[piece],
                response_mask=mask[piece], config=config, **common,
            )
        loss.backward()
    return new.grad.norm().item()


seen = {}
for loss_mode in ("vanilla", "gspo", "sapo", "cispo", "kl", "geo_mean"):
    seen[loss_mode] = [norm(loss_mode, pieces) for pieces in (1, 2, 4, 8)]
    print(f"{loss_mode:>8}: gradient in 1, 2, 4, 8 micro-batches:", " ".join(f"{value:.4f}" for value in seen[loss_mode]))
grown = seen.pop("geo_mean")
assert all(abs(value / values[0] - 1) < 1e-4 for values in seen.values() for value in values)
assert all(abs(value / grown[0] - pieces) < 1e-3 for value, pieces in zip(grown, (1, 2, 4, 8)))
print("seen: the gradient of geo_mean is as many times too large as there are micro-batches")
PYTHON
