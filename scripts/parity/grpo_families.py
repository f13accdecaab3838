"""Learning from rewards in every MoE family: answers written, judged and learnt from, and what moved.

    .venv/bin/python scripts/parity/grpo_families.py [--steps 2] [--method rloo] [MODEL_TYPE ...]

Builds a tiny random checkpoint of each family in the installed transformers (as tests/parity does), loads it in int8,
attaches the default adapter, and trains it through the run's own trainer on rewards of the answers that it writes.
Printed for each: adapters that moved, the first distance from the base (it is the same model then, so it is 0 but for
rounding), the mean reward of the first answers, and whether answers shared their prompts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from scripts.parity.family_sweep import ROUNDING, Row, parser, start, sweep, tiny_tokenizer, tried

if TYPE_CHECKING:
    from toolkit.training.rollouts import Rollouts

__all__ = ["main", "rollouts", "table", "train"]

_PROMPTS, _MOST = 24, 6


def rollouts(
    model: Any,
    tokenizer: Any,
    method: str = "grpo",
    options: Mapping[str, Any] = {},
    head: Any = None,
    share: int = 1,
) -> Rollouts:
    """Counting prompts of the tiny vocabulary, of several lengths; the reward of an answer is how many of its tokens
    are even, and half a point if it does not begin with a letter. `head` drafts two tokens a pass; `share` answers may
    have one prompt in a pass that learns."""
    from toolkit.data import Question
    from toolkit.evaluate.generate import AnswerWriter
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
    writer = AnswerWriter(model, tokenizer, told, head=head, count=2)
    return Rollouts(
        method,
        told,
        judge,
        questions,
        questions[:4],
        write=writer,
        read=lambda ids, prompt: str(tokenizer.decode(ids)),
        decode=lambda ids: str(tokenizer.decode(ids)),
        figures=writer.figures,
        share=share,
    )


def even(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[int]:
    """A reward: even tokens of an answer."""
    return [sum(token % 2 == 0 for token in ids) for ids in completion_ids]


def train(family: str, folder: Path, steps: int = 2, method: str = "grpo") -> Row:
    """Build the family in `folder` and train it; a failure is told in the row."""
    return tried(family, folder, partial(_trained, family, steps, method))


def _trained(family: str, steps: int, method: str, folder: Path) -> Row:
    from tests.harness.training import run_context
    from toolkit.adapters import adapter_coverage
    from toolkit.training import train_adapter

    adapted, section = start(folder, method, steps, batch=8)
    tokenizer = tiny_tokenizer()
    told = rollouts(adapted, tokenizer, method, {"beta": 0.01}, share=2)
    given = run_context(folder, section, rollouts=told)
    try:
        train_adapter(adapted, tokenizer, table(told), None, given)
    finally:
        told.judge.close()
    first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    reached = adapter_coverage(adapted)
    if first["reward"] is None:
        return Row(family, failed="a reward failed")
    shared = "prompts: passed through the model once" in given.console.file.getvalue()
    said = f"first distance {first['kl']:+.1e}, first reward {first['reward']:.2f}"
    said += f", {'prompts shared' if shared else 'prompts read for each answer'}"
    return Row(family, reached.moved, reached.adapters, first["kl"], said)


def table(told: Rollouts) -> Any:
    """The questions as the rows that every run has."""
    from datasets import Dataset

    rows = [list(question.prompt_ids) for question in told.train]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a family fails."""
    options = parser(__doc__, 2, ("grpo", "rloo"), "grpo").parse_args(arguments)
    tell = partial(train, steps=options.steps, method=options.method)
    return sweep(options.model_types, tell, f"first distance within {ROUNDING:g} nats of 0")


if __name__ == "__main__":
    sys.exit(main())
