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

import argparse
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the families are built by the tests' own module
os.environ.setdefault("HF_HUB_OFFLINE", "1")

__all__ = ["REFUSED", "Row", "main", "sweep", "train"]

REFUSED = ("diffusion_gemma", "qwen3_omni_moe")
"""Families that no adapter is trained in (tests/parity/test_every_family.py)."""
_ROUNDING = 1e-3
"""Nats: in fp32 the same answer rounds to about 1e-5 a token among other rows, and an answer here has eight tokens."""


@dataclass(frozen=True)
class Row:
    """One family: adapters moved of all, how far the first step is off in nats, the first load-balancing loss, and
    whether TRL's fused head has the family's own logits; or what went wrong."""

    family: str
    moved: int = 0
    adapters: int = 0
    off: float = float("nan")
    balance: str = ""
    head: str = ""
    failed: str = ""

    @property
    def passes(self) -> bool:
        """Whether every adapter moved, by figures that are right."""
        return not self.failed and self.moved == self.adapters > 0 and abs(self.off) <= _ROUNDING


def train(family: str, folder: Path, steps: int = 3, method: str = "dpo") -> Row:
    """Build the family in `folder` and train it; a failure is told in the row."""
    from tests.harness.families import build, tiny_config
    from toolkit.errors import OnecardError

    build(tiny_config(family)).save_pretrained(folder / "model")
    try:
        return _trained(family, folder, steps, method)
    except (OnecardError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return Row(family, failed=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}")


def _trained(family: str, folder: Path, steps: int, method: str) -> Row:
    from unittest import mock

    from rich.console import Console
    from transformers import AutoTokenizer, set_seed

    from toolkit.adapters import adapter_coverage, attach_lora
    from toolkit.quant import load_int8
    from toolkit.recipe import PREFERENCE_METHODS, REFERENCE_FREE, TrainingSection
    from toolkit.training import Preference, RunContext, train_adapter

    model, _ = load_int8(str(folder / "model"))
    set_seed(0)
    adapted = attach_lora(model, r=2)
    section = TrainingSection(
        method=method, packing=False, max_steps=steps, learning_rate=1e-2, per_device_train_batch_size=2,
        warmup_steps=0, use_cpu=True, gradient_checkpointing=False, save_steps=1000,
    )  # fmt: skip
    said = io.StringIO()
    options = PREFERENCE_METHODS[method]().model_dump() if method in PREFERENCE_METHODS else {}
    preference = (
        Preference(options, folder / "reference.safetensors", {"start": ""}, method=method) if options else None
    )
    rows = pairs({"sft": 1, "orpo": 2, "simpo": 2}.get(method, 2 * steps))  # one batch, where it is looked at by hand
    good, bad = _by_hand(adapted, rows)
    context = RunContext(
        folder=folder / "checkpoints",
        metrics=folder / "metrics.jsonl",
        arguments={**section.model_dump(exclude={"output_dir"}), "report_to": []},
        device="cpu",
        dtype="float32",
        console=Console(file=said, width=200),
        preference=preference,
    )
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "quickstart" / "nano-qwen3moe-2m")
    tokenizer.pad_token_id = 0  # of the tiny vocabulary
    with mock.patch("toolkit.training.trainer.pays_to_keep_logits", return_value=False):
        train_adapter(adapted, tokenizer, rows, None, context)
    first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    reached = adapter_coverage(adapted)
    balance = "none" if "no load-balancing loss" in said.getvalue() else f"{first.get('aux_loss', float('nan')):.3f}"
    if preference is None:
        coefficient = getattr(adapted.config.get_text_config(), "router_aux_loss_coef", 0.0)
        off = first["loss"] - first.get("aux_loss", 0.0) * coefficient + (good + bad) / 2
    else:
        off = first["rewards/margins"] / options["beta"] - (good - bad if method in REFERENCE_FREE else 0.0)
    head = "another" if "TRL's fused head" in said.getvalue() else "own"
    return Row(family, reached.moved, reached.adapters, off, balance, head)


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


def sweep(families: Sequence[str], steps: int, method: str = "dpo") -> list[Row]:
    """One row a family, printed as it is known."""
    rows = []
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(train(family, Path(folder), steps, method))
        row = rows[-1]
        told = f"{row.moved}/{row.adapters} moved, first step off by {row.off:+.1e}, balance {row.balance}, "
        told += f"TRL's logits: {row.head}"
        print(f"{'ok    ' if row.passes else 'FAILED'}  {family:24} {row.failed or told}", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a family fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="only these families")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--method", choices=("sft", "dpo", "kto", "orpo", "simpo"), default="dpo", help="what trains")
    options = parser.parse_args(arguments)
    from transformers.utils import logging as transformers_logging

    from tests.harness.families import families

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    every = [family.model_type for family in families() if family.model_type not in REFUSED]
    rows = sweep(options.model_types or every, options.steps, options.method)
    passed = sum(row.passes for row in rows)
    print(f"{passed} of {len(rows)} families: every default adapter moved, first step right within {_ROUNDING:g} nats")
    return int(passed < len(rows))


if __name__ == "__main__":
    sys.exit(main())
