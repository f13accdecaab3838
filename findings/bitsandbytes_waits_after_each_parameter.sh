#!/usr/bin/env bash
# bitsandbytes 0.50.2's optimizers wait for the whole device after the update of every single parameter, 8-bit, paged or
# not: `step` calls torch.cuda.synchronize behind each update, where torch's own optimizers never wait. Nothing on the
# host needs the result. An adapter on a MoE has hundreds of tensors, so a step has hundreds of waits, each of which
# drains the queue that hides the host's own time. Counted here on a CPU, at the function that would wait on a card.
# Follows: profile the optimizer, and count its waits, before blaming the model for an idle card.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import inspect
from importlib.metadata import version

import bitsandbytes
import torch
from bitsandbytes import utils
from bitsandbytes.optim import optimizer

print({name: version(name) for name in ("bitsandbytes", "torch")})
assert "torch.cuda.synchronize()" in inspect.getsource(utils.sync_gpu)
waits = []
optimizer.sync_gpu = waits.append
for name in ("AdamW8bit", "AdamW", "Lion8bit"):
    parameters = [torch.nn.Parameter(torch.ones(8192)) for _ in range(50)]
    running = getattr(bitsandbytes.optim, name)(parameters, lr=1e-3)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        waits.clear()
        running.step()
    print(f"{name}: {len(waits)} waits in a step of {len(parameters)} parameters")
    assert len(waits) >= len(parameters), "it waits less often now"
PYTHON
