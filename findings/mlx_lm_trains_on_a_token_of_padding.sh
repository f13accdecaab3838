#!/usr/bin/env bash
# mlx-lm 0.32.2's loss counts one position too many: behind each example's last token the first token of the padding,
# which is token 0, is a label too. So every example teaches that token 0 (in most vocabularies a plain one, such as "!")
# comes after its end, and the reported losses and token counts have that label in them. Under --mask-prompt with an answer
# of one token and its end that is one label in three; with an answer that is one token, half of what is learnt.
# Follows: reported losses are not those of the data, and a model that is asked to go on past an end goes on with token 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.tuner.trainer import default_loss, iterate_batches

print({name: version(name) for name in ("mlx", "mlx-lm")})
vocabulary = 16


class Certain:
    """At each position almost all probability on the token that really follows; after the last one, on `after`."""

    def __init__(self, tokens, after):
        self.follows = [*tokens[1:], after]

    def __call__(self, inputs):
        follows = mx.array([(self.follows + [0] * inputs.shape[1])[: inputs.shape[1]]])
        return 50.0 * (mx.arange(vocabulary) == follows[..., None])


tokens, prompt = [5, 6, 7, 8], 3  # a prompt of three tokens and an answer of one, 8
batch, spans = next(iterate_batches([(tokens, prompt)], batch_size=1, max_seq_length=2048))
print("batch:", batch[0, :6].tolist(), "… with the answer from", spans[0, 0].item(), "to", spans[0, 1].item())
found = {after: default_loss(Certain(tokens, after), batch, spans) for after in (0, 9)}
for after, (loss, labels) in found.items():
    print(f"a model that knows the answer and says token {after} after it: loss {loss.item():.1f} over {labels.item()} labels")
assert all(labels.item() == 2 for _, labels in found.values()), "the answer has one token"
assert found[0][0].item() < 1e-3 and abs(found[9][0].item() - 25) < 1e-3
print("seen: the padding behind each example is a label, and here half of the loss")
PYTHON
