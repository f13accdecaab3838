#!/usr/bin/env bash
# compressed-tensors 0.20.1: where regex targets of two config groups fit the same module, the first group does not
# win, nor the narrower pattern, but the pattern that comes first in the alphabet. So a "^" at the start of a pattern,
# which means nothing there, turns down_proj from 4 bits to 8, and the order of the groups plays no part. No message
# tells: "Could not match" is logged for the narrow pattern where its group stands first, also when that pattern won.
# Follows: a model may be quantised otherwise than its recipe reads. Write patterns that cannot both fit; whoever
# reads such a checkpoint must sort the patterns as this package does, or believe the stored tensors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 compressed-tensors==0.20.1 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

print({name: version(name) for name in ("compressed-tensors", "torch")})


def bits(narrow: str, narrow_first: bool) -> int:
    """The width that experts.0.down_proj gets of a group for down_proj (4 bits) and one for all experts (8 bits)."""
    model = torch.nn.ModuleDict(
        {"experts": torch.nn.ModuleList([torch.nn.ModuleDict({"down_proj": torch.nn.Linear(32, 32)})])}
    )
    groups = [
        {"targets": [target], "weights": {"num_bits": width, "strategy": "channel"}}
        for target, width in ((narrow, 4), (r"re:.*experts\..*", 8))
    ]
    if not narrow_first:
        groups.reverse()
    config = {"config_groups": dict(zip(("group_0", "group_1"), groups, strict=True))}
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    return model.experts[0].down_proj.quantization_scheme.weights.num_bits


seen = {}
for narrow in (r"re:.*down_proj$", r"re:^.*down_proj$"):
    for narrow_first in (True, False):
        seen[narrow, narrow_first] = bits(narrow, narrow_first)
        place = "group_0" if narrow_first else "group_1"
        print(f"{narrow} (4 bits) is {place}: down_proj has {seen[narrow, narrow_first]} bits")
assert list(seen.values()) == [4, 4, 8, 8], "the alphabet does not decide any more"
PYTHON
