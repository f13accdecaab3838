#!/usr/bin/env bash
# mlx-lm 0.32.2 sorts examples by length and cuts batches from the short end; what is left over at the long end makes no
# batch. It is the same in every epoch: only the order of the batches is shuffled. So the longest examples (up to
# batch_size - 1 of them) are never trained on, and never evaluated, with --val-batches -1 ("the entire validation set")
# too. Nothing is said.
# Follows: with few long examples exactly these are lost, and the reported loss is that of the short ones. Train with
# --batch-size 1 and --grad-accumulation-steps, or repeat examples until they divide.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.trainer import evaluate, iterate_batches

print({name: version(name) for name in ("mlx", "mlx-lm")})
lengths = [5, 9, 3, 7, 40, 33, 21]
rows = [([1] * length, 0) for length in lengths]  # tokens, and where the labels begin
batches = iterate_batches(rows, batch_size=4, max_seq_length=2048, loop=True)
seen = {length for _ in range(200) for length in next(batches)[1][:, 1].tolist()}
print("lengths of the examples:", sorted(lengths), "trained on in 200 batches of 4:", sorted(seen))
assert seen == {3, 5, 7, 9}

asked = []


def loss(model, batch, spans):
    asked.extend(spans[:, 1].tolist())
    return mx.array(1.0), mx.array(1)


evaluate(nn.Identity(), rows, batch_size=4, num_batches=-1, loss=loss)
print("evaluated as the entire validation set:", sorted(asked))
assert sorted(asked) == [3, 5, 7, 9]
print("seen: the longest examples belong to no batch, in no epoch")
PYTHON
