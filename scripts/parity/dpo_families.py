"""Preference tuning of every MoE family: a reference, three steps, and what moved.

    .venv/bin/python scripts/parity/dpo_families.py [--steps 3] [MODEL_TYPE ...]

Builds a tiny random checkpoint of each family in the installed transformers (as tests/parity does), loads it in int8,
attaches the default adapter, and trains it by DPO on two pairs a step through the run's own trainer. Printed for each:
adapters that moved, the first step's margin (policy and reference are then the same model), the load-balancing loss,
and whether TRL's fused head computes the family's own logits. Where it does not, ours are used on every device.
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
    """One family: adapters moved of all, the first margin in nats, the first load-balancing loss, whether TRL's fused
    head has the family's own logits, and what went wrong."""

    family: str
    moved: int = 0
    adapters: int = 0
    margin: float = float("nan")
    balance: str = ""
    head: str = ""
    failed: str = ""

    @property
    def passes(self) -> bool:
        """Whether every adapter moved from a reference that was the model itself."""
        return not self.failed and self.moved == self.adapters > 0 and abs(self.margin) <= _ROUNDING


def train(family: str, folder: Path, steps: int = 3) -> Row:
    """Build the family in `folder` and train it; a failure is told in the row."""
    from tests.harness.families import build, tiny_config
    from toolkit.errors import OnecardError

    build(tiny_config(family)).save_pretrained(folder / "model")
    try:
        return _trained(family, folder, steps)
    except (OnecardError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return Row(family, failed=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}")


def _trained(family: str, folder: Path, steps: int) -> Row:
    from rich.console import Console
    from transformers import AutoTokenizer, set_seed

    from toolkit.adapters import adapter_coverage, attach_lora
    from toolkit.quant import load_int8
    from toolkit.recipe import DpoSection, TrainingSection
    from toolkit.training import Preference, RunContext, train_adapter

    model, _ = load_int8(str(folder / "model"))
    set_seed(0)
    adapted = attach_lora(model, r=2)
    section = TrainingSection(
        method="dpo", packing=False, max_steps=steps, learning_rate=1e-2, per_device_train_batch_size=2,
        warmup_steps=0, use_cpu=True, gradient_checkpointing=False, save_steps=1000,
    )  # fmt: skip
    said = io.StringIO()
    context = RunContext(
        folder=folder / "checkpoints",
        metrics=folder / "metrics.jsonl",
        arguments={**section.model_dump(exclude={"output_dir"}), "report_to": []},
        device="cpu",
        dtype="float32",
        console=Console(file=said, width=200),
        preference=Preference(DpoSection().model_dump(), folder / "reference.safetensors", {"start": ""}),
    )
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "quickstart" / "nano-qwen3moe-2m")
    tokenizer.pad_token_id = 0  # of the tiny vocabulary
    train_adapter(adapted, tokenizer, pairs(2 * steps), None, context)
    first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    reached = adapter_coverage(adapted)
    balance = "none" if "no load-balancing loss" in said.getvalue() else f"{first.get('aux_loss', float('nan')):.3f}"
    margin = first["rewards/margins"] / DpoSection().beta
    head = "another" if "TRL's fused head" in said.getvalue() else "own"
    return Row(family, reached.moved, reached.adapters, margin, balance, head)


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


def sweep(families: Sequence[str], steps: int) -> list[Row]:
    """One row a family, printed as it is known."""
    rows = []
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(train(family, Path(folder), steps))
        row = rows[-1]
        told = f"{row.moved}/{row.adapters} moved, first margin {row.margin:+.1e}, balance {row.balance}, "
        told += f"TRL's logits: {row.head}"
        print(f"{'ok    ' if row.passes else 'FAILED'}  {family:24} {row.failed or told}", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a family fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="only these families")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    options = parser.parse_args(arguments)
    from transformers.utils import logging as transformers_logging

    from tests.harness.families import families

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    every = [family.model_type for family in families() if family.model_type not in REFUSED]
    rows = sweep(options.model_types or every, options.steps)
    passed = sum(row.passes for row in rows)
    print(f"{passed} of {len(rows)} families: every default adapter moved, first margin within {_ROUNDING:g} nats of 0")
    return int(passed < len(rows))


if __name__ == "__main__":
    sys.exit(main())
