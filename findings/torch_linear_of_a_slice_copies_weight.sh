#!/usr/bin/env bash
# The logits of each prompt's last token are `linear(hidden[:, -1:], weight)`: so transformers' `generate` reads prompts,
# with `logits_to_keep=1`. On a CPU torch 2.13 does not fold such a slice, which is not contiguous, into one matrix: it
# multiplies sequence by sequence, and in bf16 it copies the weight for each of them first. The result is right. But 16
# prompts and a vocabulary of 49,152 take 0.9 GB for a moment and a hundred times as long as the same numbers copied
# together, and beside a small model that is most of the time that the prompts take. One prompt costs nothing, so it
# looks like a price of batches.
# Follows: call `.contiguous()` on hidden states before the output head. torch 2.15 no longer does this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import time
from importlib.metadata import version
from resource import RUSAGE_SELF, getrusage

import torch
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

print("torch", version("torch"), torch.backends.cpu.get_cpu_capability())
torch.set_grad_enabled(False)
prompts, tokens, width, words = 16, 32, 576, 49152
hidden = torch.randn(prompts, tokens, width).bfloat16()
weight = torch.randn(words, width).bfloat16()
last = hidden[:, -1:]


def measured(rows):
    """Result, seconds, MB by which the process has grown at its highest, and torch's products."""
    before = getrusage(RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    found = linear(rows, weight)
    seconds = time.perf_counter() - began
    grown = (getrusage(RUSAGE_SELF).ru_maxrss - before) / 1024
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        linear(rows, weight)
    names = {event.key for event in seen.key_averages()}
    return found, seconds, grown, sorted(names & {"aten::mm", "aten::addmm", "aten::bmm"})


linear(hidden[0, :2], weight)
together, quick, little, one = measured(last.contiguous())
apart, slow, much, many = measured(last)
size = weight.nbytes / 2**20
print(f"contiguous: {one}, {quick * 1e3:.1f} ms, {little:.0f} MB more")
print(f"slice:      {many}, {slow * 1e3:.1f} ms, {much:.0f} MB more; the weight has {size:.0f} MB, there are {prompts} prompts")
assert (together - apart).abs().max() <= 0.02 * together.abs().max()
assert one != many == ["aten::bmm"], "a slice is multiplied at once now"
assert much > 0.8 * prompts * size, "the weight is no longer copied for each prompt"
PYTHON
