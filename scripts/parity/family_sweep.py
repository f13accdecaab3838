"""What sweeps of training over every MoE family share: how a family is tried, told and counted."""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the families are built by the tests' own module

__all__ = ["REFUSED", "ROUNDING", "Row", "parser", "start", "sweep", "tiny_tokenizer", "tried"]

REFUSED = ("diffusion_gemma", "qwen3_omni_moe")
"""Families that no adapter is trained in (tests/parity/test_every_family.py)."""
ROUNDING = 1e-3
"""Nats: in fp32 the same answer rounds to about 1e-5 a token among other rows, and an answer here has eight at most."""


@dataclass(frozen=True)
class Row:
    """One family: adapters moved of all, how far the first step is off in nats, and what else is told of it; or what
    went wrong."""

    family: str
    moved: int = 0
    adapters: int = 0
    off: float = float("nan")
    told: str = ""
    head: str = ""
    """Whose logits TRL's fused head has, where that is looked at: the family's `own`, or `another`'s."""
    failed: str = ""

    @property
    def passes(self) -> bool:
        """Whether every adapter moved, by figures that are right."""
        return not self.failed and self.moved == self.adapters > 0 and abs(self.off) <= ROUNDING


def tried(family: str, folder: Path, train: Callable[[Path], Row]) -> Row:
    """Build the family in `folder`/model and train it there; a failure is told in the row."""
    from tests.harness.families import build, tiny_config
    from toolkit.errors import OnecardError

    build(tiny_config(family)).save_pretrained(folder / "model")
    try:
        return train(folder)
    except (OnecardError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return Row(family, failed=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}")


def start(folder: Path, method: str, steps: int, batch: int) -> tuple[Any, Any]:
    """The model of `folder` in int8 with the default adapter, and a training section of so many steps."""
    from transformers import set_seed

    from toolkit.adapters import attach_lora
    from toolkit.quant import load_int8
    from toolkit.recipe import TrainingSection

    model, _ = load_int8(str(folder / "model"))
    set_seed(0)
    section = TrainingSection(
        method=method, packing=False, max_steps=steps, learning_rate=1e-2, per_device_train_batch_size=batch,
        warmup_steps=0, use_cpu=True, gradient_checkpointing=False, save_steps=1000,
    )  # fmt: skip
    return attach_lora(model, r=2), section


def tiny_tokenizer() -> Any:
    """One whose padding is in the tiny vocabulary."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "quickstart" / "nano-qwen3moe-2m")
    tokenizer.pad_token_id = 0
    return tokenizer


def parser(description: str | None, steps: int, methods: Sequence[str], default: str) -> argparse.ArgumentParser:
    """The options of a sweep."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="only these families")
    made.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    made.add_argument("--method", choices=methods, default=default, help="what trains")
    return made


def sweep(asked: Sequence[str], train: Callable[[str, Path], Row], right: str) -> int:
    """Train every family, or those asked for, and print a row of each as it is known; 1 where one fails.

    `right`: what is right of those that pass, in words.
    """
    from transformers.utils import logging as transformers_logging

    from tests.harness.families import families

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    every = asked or [family.model_type for family in families() if family.model_type not in REFUSED]
    passed = 0
    for family in every:
        with tempfile.TemporaryDirectory() as folder:
            row = train(family, Path(folder))
        passed += row.passes
        told = row.failed or f"{row.moved}/{row.adapters} moved, {row.told}"
        print(f"{'ok    ' if row.passes else 'FAILED'}  {family:24} {told}", flush=True)
    print(f"{passed} of {len(every)} families: every default adapter moved, {right}")
    return int(passed < len(every))
