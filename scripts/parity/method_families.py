"""Every method of training over every MoE family: a reference where there is one, three steps, and what moved.

    .venv/bin/python scripts/parity/method_families.py [--method sft|dpo|kto|orpo|simpo] [--steps 3] [MODEL_TYPE ...]

Builds a tiny random checkpoint of each family in the installed transformers (as tests/parity does), loads it in int8,
attaches the default adapter, and trains it on two examples or pairs a step through the run's own trainer. Printed for
each: adapters that moved, how far the first step is off, the load-balancing loss, and whether TRL's fused head computes
the family's own logits; where it does not, ours are used. What is off by how much: DPO's and KTO's margin from 0, since
model and reference are then the same; ORPO's and SimPO's from the difference of mean log-probabilities by the model's
plain logits; the loss of single answers, computed by TRL's head as on a card, from that of plain logits.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from scripts.parity.family_sweep import ROUNDING, Row, parser, start, sweep, tiny_tokenizer, tried

__all__ = ["main", "train"]


def train(family: str, folder: Path, steps: int = 3, method: str = "dpo") -> Row:
    """Build the family in `folder` and train it; a failure is told in the row."""
    return tried(family, folder, partial(_trained, family, steps, method))


def _trained(family: str, steps: int, method: str, folder: Path) -> Row:
    from unittest import mock

    from tests.harness.training import run_context
    from toolkit.adapters import adapter_coverage
    from toolkit.recipe import PREFERENCE_METHODS, REFERENCE_FREE
    from toolkit.training import Preference, train_adapter

    adapted, section = start(folder, method, steps, batch=2)
    options = PREFERENCE_METHODS[method]().model_dump() if method in PREFERENCE_METHODS else {}
    preference = (
        Preference(options, folder / "reference.safetensors", {"start": ""}, method=method) if options else None
    )
    rows = pairs({"sft": 1, "orpo": 2, "simpo": 2}.get(method, 2 * steps))  # one batch, where it is looked at by hand
    good, bad = _by_hand(adapted, rows)
    context = run_context(folder, section, preference=preference)
    with mock.patch("toolkit.training.trainer.pays_to_keep_logits", return_value=False):
        train_adapter(adapted, tiny_tokenizer(), rows, None, context)
    said = context.console.file.getvalue()  # type: ignore[attr-defined]
    first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    reached = adapter_coverage(adapted)
    balance = "none" if "no load-balancing loss" in said else f"{first.get('aux_loss', float('nan')):.3f}"
    if preference is None:
        coefficient = getattr(adapted.config.get_text_config(), "router_aux_loss_coef", 0.0)
        off = first["loss"] - first.get("aux_loss", 0.0) * coefficient + (good + bad) / 2
    else:
        off = first["rewards/margins"] / options["beta"] - (good - bad if method in REFERENCE_FREE else 0.0)
    head = "another" if "TRL's fused head" in said else "own"
    told = f"first step off by {off:+.1e}, balance {balance}, TRL's logits: {head}"
    return Row(family, reached.moved, reached.adapters, off, told, head)


def _by_hand(model: Any, rows: Any) -> tuple[float, float]:
    """Mean log-probabilities of a token of the chosen and of the rejected answers, by all logits."""
    import torch

    from toolkit.training.preference import without_noise

    without_noise(model)
    model.eval()
    found = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            log_probs = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
        told = log_probs.gather(1, ids[1:, None])[:, 0]
        found.append(told[[label >= 0 for label in row["labels"][1:]]].mean())
    return float(torch.stack(found[::2]).mean()), float(torch.stack(found[1::2]).mean())


def pairs(count: int) -> Any:
    """Rows 2n and 2n+1 are two answers of eight tokens to one prompt of sixteen, all of the tiny vocabulary."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(count):
        prompt = torch.randint(3, 80, (16,), generator=generator).tolist()
        answers = torch.randint(3, 80, (2, 8), generator=generator).tolist()
        rows += [{"input_ids": prompt + answer, "labels": [-100] * 16 + answer} for answer in answers]
    return Dataset.from_list(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a family fails."""
    options = parser(__doc__, 3, ("sft", "dpo", "kto", "orpo", "simpo"), "dpo").parse_args(arguments)
    tell = partial(train, steps=options.steps, method=options.method)
    return sweep(options.model_types, tell, f"first step right within {ROUNDING:g} nats")


if __name__ == "__main__":
    sys.exit(main())
