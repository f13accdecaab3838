"""Learning from rewards in every MoE family: answers written, judged and learnt from, and what moved.

    .venv/bin/python scripts/parity/grpo_families.py [--steps 2] [--method rloo] [MODEL_TYPE ...]

Builds a tiny random checkpoint of each family in the installed transformers (as tests/parity does), loads it in int8,
attaches the default adapter, and trains it through the run's own trainer on rewards of the answers that it writes.
Printed for each: adapters that moved, the first distance from the base (it is the same model then, so it is 0 but for
rounding), and the mean reward of the first answers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the families are built by the tests' own module
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from scripts.parity.method_families import REFUSED  # noqa: E402

if TYPE_CHECKING:
    from toolkit.training.rollouts import Rollouts

__all__ = ["Row", "main", "rollouts", "sweep", "train"]

_ROUNDING = 1e-3
"""Nats a token: in fp32 the same answer rounds to about 1e-5 a token among other rows."""
_PROMPTS, _MOST = 24, 6


@dataclass(frozen=True)
class Row:
    """One family: adapters moved of all, the first distance from the base in nats, the first step's mean reward, and
    what went wrong."""

    family: str
    moved: int = 0
    adapters: int = 0
    distance: float = float("nan")
    reward: float = float("nan")
    failed: str = ""

    @property
    def passes(self) -> bool:
        """Whether every adapter moved from a reference that was the model itself."""
        return not self.failed and self.moved == self.adapters > 0 and abs(self.distance) <= _ROUNDING


def rollouts(model: Any, tokenizer: Any, method: str = "grpo", options: Mapping[str, Any] = {}) -> Rollouts:
    """Counting prompts of the tiny vocabulary, of several lengths; the reward of an answer is how many of its tokens
    are even, and half a point if it does not begin with a letter."""
    from toolkit.data import Question
    from toolkit.evaluate.generate import write_answers
    from toolkit.recipe import GrpoSection, RlooSection
    from toolkit.rewards import Judge, Reward
    from toolkit.training.rollouts import Rollouts

    section = {"grpo": GrpoSection, "rloo": RlooSection}[method]
    told = section(**{"num_generations": 2, "max_completion_length": _MOST, **options}).model_dump()
    questions = [
        Question(f"row {n}", tuple(3 + (n * 7 + step) % 70 for step in range(5 + n % 4)), "count on", "", {})
        for n in range(_PROMPTS)
    ]
    judge = Judge(
        [Reward("even", f"{__file__}:even"), Reward("start", "regex", 0.5, {"pattern": r"^\W"})],
        seconds=60.0,
        memory=4 << 30,
    )
    return Rollouts(
        method,
        told,
        judge,
        questions,
        questions[:4],
        write=partial(write_answers, model, tokenizer, told),
        read=lambda ids, prompt: str(tokenizer.decode(ids)),
        decode=lambda ids: str(tokenizer.decode(ids)),
    )


def even(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[int]:
    """A reward: even tokens of an answer."""
    return [sum(token % 2 == 0 for token in ids) for ids in completion_ids]


def train(family: str, folder: Path, steps: int = 2, method: str = "grpo") -> Row:
    """Build the family in `folder` and train it; a failure is told in the row."""
    from tests.harness.families import build, tiny_config
    from toolkit.errors import OnecardError

    build(tiny_config(family)).save_pretrained(folder / "model")
    try:
        return _trained(family, folder, steps, method)
    except (OnecardError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return Row(family, failed=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}")


def _trained(family: str, folder: Path, steps: int, method: str) -> Row:
    from rich.console import Console
    from transformers import AutoTokenizer, set_seed

    from toolkit.adapters import adapter_coverage, attach_lora
    from toolkit.quant import load_int8
    from toolkit.recipe import TrainingSection
    from toolkit.training import RunContext, train_adapter

    model, _ = load_int8(str(folder / "model"))
    set_seed(0)
    adapted = attach_lora(model, r=2)
    section = TrainingSection(
        method=method, packing=False, max_steps=steps, learning_rate=1e-2, per_device_train_batch_size=8,
        warmup_steps=0, use_cpu=True, gradient_checkpointing=False, save_steps=1000,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "quickstart" / "nano-qwen3moe-2m")
    tokenizer.pad_token_id = 0  # of the tiny vocabulary
    told = rollouts(adapted, tokenizer, method, {"beta": 0.01})
    context = RunContext(
        folder=folder / "checkpoints",
        metrics=folder / "metrics.jsonl",
        arguments={**section.model_dump(exclude={"output_dir"}), "report_to": []},
        device="cpu",
        dtype="float32",
        console=Console(file=io.StringIO(), width=200),
        rollouts=told,
    )
    try:
        train_adapter(adapted, tokenizer, table(told), None, context)
    finally:
        told.judge.close()
    first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    reached = adapter_coverage(adapted)
    if first["reward"] is None:
        return Row(family, failed="a reward failed")
    return Row(family, reached.moved, reached.adapters, first["kl"], first["reward"])


def table(told: Rollouts) -> Any:
    """The questions as the rows that every run has."""
    from datasets import Dataset

    rows = [list(question.prompt_ids) for question in told.train]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def sweep(families: Sequence[str], steps: int, method: str) -> list[Row]:
    """One row a family, printed as it is known."""
    rows = []
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(train(family, Path(folder), steps, method))
        row = rows[-1]
        told = f"{row.moved}/{row.adapters} moved, first distance {row.distance:+.1e}, first reward {row.reward:.2f}"
        print(f"{'ok    ' if row.passes else 'FAILED'}  {family:24} {row.failed or told}", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a family fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="only these families")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps")
    parser.add_argument("--method", choices=("grpo", "rloo"), default="grpo", help="whose loss")
    options = parser.parse_args(arguments)
    from transformers.utils import logging as transformers_logging

    from tests.harness.families import families

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    every = [family.model_type for family in families() if family.model_type not in REFUSED]
    rows = sweep(options.model_types or every, options.steps, options.method)
    passed = sum(row.passes for row in rows)
    print(
        f"{passed} of {len(rows)} families: every default adapter moved, first distance within {_ROUNDING:g} nats of 0"
    )
    return int(passed < len(rows))


if __name__ == "__main__":
    sys.exit(main())
