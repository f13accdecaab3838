#!/usr/bin/env bash
# bitsandbytes 0.50.2: a Linear4bit that is called in eval mode on a CPU with AVX-512 for bf16 (servers of the last years)
# changes the layout of its stored weight in place, for a faster kernel. That kernel knows the layout; nothing else does:
# - dequantize_4bit, and so PEFT's merge_and_unload and transformers' model.dequantize(), read it as if it were the old one,
#   and get noise: after a single answer, merging an adapter of zero leaves nothing of the model;
# - back in train mode the layer goes on with that kernel, which has no backward: outputs are right, but no gradient comes
#   through its weight, only through its own adapter and around it, so that from the first evaluation on the layers before
#   it are trained by another gradient, or by none. torch warns once that an autograd kernel is not registered.
# Saving is right: state_dict puts the old layout back in what it returns.
# Follows: on such machines, train and merge before the first call in eval mode, or load the model anew after it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
if ! grep -q avx512_bf16 /proc/cpuinfo; then
    echo "this CPU has no AVX-512 for bf16, so the layout is not changed here"
    exit 0
fi
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2 \
    transformers==5.23.0 peft==0.21.2 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" - <<'PYTHON'
import warnings
from importlib.metadata import version

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model

print({name: version(name) for name in ("bitsandbytes", "peft", "torch")})
inputs = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))


def made(seed=0):
    """Two layers of 4 bits with small adapters."""
    torch.manual_seed(seed)
    plain = torch.nn.Sequential(torch.nn.Linear(128, 256, bias=False), torch.nn.Linear(256, 64, bias=False))
    layers = []
    for layer in plain:
        four = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        four.load_state_dict(layer.state_dict())
        layers.append(four.to("cpu"))
    base = torch.nn.Sequential(*layers)
    base.is_loaded_in_4bit = True  # as transformers marks it
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.02  # small changes, as of a young adapter
    return model


def gradients(model):
    """The norms of the gradients of both layers' A."""
    model.train()
    model.zero_grad()
    (model(inputs).square().mean()).backward()
    found = [p.grad for name, p in model.named_parameters() if "lora_A" in name]
    return [0.0 if grad is None else float(grad.norm()) for grad in found]


found = {}
for answered in (False, True):
    model = made()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with torch.no_grad():
            outputs = model.train()(inputs)
            if answered:
                again = model.eval()(inputs)
                assert float((again - outputs).norm() / outputs.norm()) < 0.02
        norms = gradients(model)
        with torch.no_grad():
            merged = model.merge_and_unload().train()(inputs)
    error = float((merged - outputs).norm() / outputs.norm())
    found[answered] = error, norms
    said = sorted({str(line.message).splitlines()[0][:60] for line in told})
    print(
        f"{'after' if answered else 'without'} a call in eval mode: the merged model is {error:.3f} of its outputs off; gradients of "
        f"the two layers' A: {norms[0]:.4f} and {norms[1]:.4f}; warnings {said}"
    )
assert found[False][0] < 0.2 and min(found[False][1]) > 0
assert found[True][0] > 0.9 and found[True][1][1] > 0 and found[True][1][0] < 0.2 * found[False][1][0]
print("seen: after an answer the layers can neither be merged nor trained through")
PYTHON
