"""Every MoE family with settings that nobody chose: ours against stock transformers + PEFT on the same weights.

    .venv/bin/python scripts/parity/varied_settings.py [FAMILY …] [--seeds 2]

A family's tiny config gets other numbers of experts and of experts a token, other widths, activations, biases, shared
experts, dense layers, tied embeddings. What transformers itself does not build is taken back, one setting at a time.
The random checkpoint is loaded with its experts in int8, int4 or MXFP4. Logits, logits with an adapter on experts,
router and linears, and the gradient of every LoRA tensor are compared with those of stock on the multiplied-out
weights. Exits with 1 where one differs, or anything is left unadapted.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.parity.family_sweep import REFUSED
from tests.harness.families import STOCK_LOSES_KEYS, build, families, tiny_config
from toolkit.adapters import adapter_coverage, attach_lora
from toolkit.architecture import auto_class, describe
from toolkit.errors import ModelError
from toolkit.quant import dequantize_state, load_int8

__all__ = ["Compared", "compare", "main"]

_NEAR, _NEAR_GRADIENTS = 1e-4, 5e-4
"""Of the largest logit, and of a gradient's length with a thousandth of the longest one's beside it: fp32 sums in
another order, over a few layers."""
_KINDS = ("int8", "int8", "int4", "mxfp4")
_VARIED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k", (1, 2, 3, 4)),
    (r"(moe_)?num_(local_|routed_)?experts|n_routed_experts", (4, 6, 8, 16)),
    (r".*moe_intermediate_size|moe_hidden_size", (8, 20, 24, 36, 64)),
    (r"intermediate_size", (20, 40, 44, 64)),
    (r"hidden_size", (32, 64, 96)),
    (r"num_key_value_heads", (1, 2, 4)),
    (r"hidden_act(ivation)?", ("silu", "gelu", "relu", "gelu_pytorch_tanh")),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", (0, 1, 2)),
    (r"decoder_sparse_step|moe_layer_freq|moe_layer_interval", (1, 2)),
    (r"(moe_num|n|num)_shared_experts", (0, 1, 2)),
    (r"(moe_)?routed_scaling_factor|route_scale", (0.5, 1.0, 2.5)),
    (r"mlp_only_layers", ([], [0], [1])),
    (r"scor(e|ing)_func", ("softmax", "sigmoid")),
    (r".*bias.*|norm_topk.*|tie_word.*|.*qk_norm|use_gated.*", (False, True)),
)
"""Fields by pattern, and what they may be; the last pattern is of switches alone."""
_IDS = torch.randint(3, 80, (3, 24), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Compared:
    """One checkpoint: what was varied, the experts' kind, and what is wrong, or nothing."""

    family: str
    kind: str
    changes: Mapping[str, Any]
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.family} {self.kind} {json.dumps(dict(self.changes))}: {self.problem or 'the same'}"


def main(arguments: list[str] | None = None) -> int:
    """Print a line a checkpoint; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model types; all by default")
    parser.add_argument("--seeds", type=int, default=2, help="checkpoints of each family")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    names = options.families or [each.model_type for each in families() if each.model_type not in REFUSED]
    wrong = 0
    for name in names:
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as scratch:
                compared = compare(name, seed, Path(scratch))
            wrong += bool(compared.problem)
            print(compared, flush=True)
    print(f"{len(names) * options.seeds - wrong} of {len(names) * options.seeds} checkpoints of {len(names)} families")
    return min(wrong, 1)


def compare(family: str, seed: int, folder: Path) -> Compared:
    """Build the family with the settings of this seed in `folder`, and compare."""
    rng = random.Random(f"{family} {seed}")
    kind = rng.choice(_KINDS)
    model, changes = _built(family, rng)
    model.save_pretrained(folder / "model")
    try:
        problem = _problem(family, folder, kind)
    except (ModelError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return Compared(family, kind, changes, problem)


def _built(family: str, rng: random.Random) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and those changes that transformers builds a Mixture-of-Experts model with."""
    config = tiny_config(family)
    changes = _varied(config.get_text_config().to_dict(), rng)
    while True:
        try:
            model = build(_with(config, changes))
            with torch.no_grad():
                if describe(model) and model(input_ids=_IDS).logits.isfinite().all():
                    return model, changes
        except Exception:
            if not changes:
                raise
        changes.pop(rng.choice(sorted(changes)))


def _varied(fields: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """Half of the fields that may vary, with other values than they have."""
    changes = {}
    for name, value in fields.items():
        choices = next((each for pattern, each in _VARIED if re.fullmatch(pattern, name)), ())
        if len(choices) == 2 and isinstance(choices[0], bool) and not isinstance(value, bool):
            continue
        if choices and not isinstance(value, (dict, list)) and rng.random() < 0.5:
            changes[name] = rng.choice(choices)
    return {name: value for name, value in changes.items() if value != fields[name]}


def _with(config: PretrainedConfig, changes: Mapping[str, Any]) -> PretrainedConfig:
    """Built anew, since a config derives some fields from others."""
    fields, text = config.to_dict(), config.get_text_config()
    inner = next((key for key in config.sub_configs if getattr(config, key, None) is text), None)
    (fields if inner is None else fields[inner]).update(changes)
    made = type(config)
    return made(**{key: value for key, value in fields.items() if key not in ("model_type", "transformers_version")})


def _problem(family: str, folder: Path, kind: str) -> str:
    """The first difference from stock, in words; empty where there is none."""
    ours, _ = load_int8(str(folder / "model"), experts=kind)
    stock = auto_class(ours.config).from_pretrained(
        folder / "model", dtype=torch.float32, experts_implementation="eager"
    )
    stock.eval().load_state_dict(dequantize_state(ours))
    with torch.no_grad():
        if (off := _apart(ours(input_ids=_IDS).logits, stock(input_ids=_IDS).logits)) > _NEAR:
            return f"logits are {off:.1e} off"
    adapted = attach_lora(ours, r=2, target_modules="all-linear")
    counted = adapter_coverage(adapted)
    if (counted.stacks, counted.routers) != (counted.stacks_all, counted.routers_all):
        return (
            f"adapted are {counted.stacks} of {counted.stacks_all} stacks, {counted.routers} of {counted.routers_all}"
        )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if family in STOCK_LOSES_KEYS:
        return ""
    adapted.save_pretrained(folder / "adapter")
    logits, gradients = _stepped(adapted.eval())
    peft = PeftModel.from_pretrained(stock, folder / "adapter", is_trainable=True).eval()
    theirs, their_gradients = _stepped(peft)
    if (off := _apart(logits, theirs)) > _NEAR:
        return f"adapted logits are {off:.1e} off"
    if alone := sorted(gradients.keys() ^ their_gradients.keys()):
        return f"one side alone has a gradient of {alone[0]}"
    floor = 1e-3 * max(float(each.norm()) for each in their_gradients.values())
    for name, gradient in their_gradients.items():
        if (off := float((gradients[name] - gradient).norm() / (gradient.norm() + floor))) > _NEAR_GRADIENTS:
            return f"the gradient of {name} is {off:.1e} off"
    return ""


def _stepped(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of a sum of them in which each has another weight."""
    logits = model(input_ids=_IDS).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits).sin()).sum().backward()
    return logits.detach(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


if __name__ == "__main__":
    sys.exit(main())
