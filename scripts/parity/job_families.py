"""Every MoE family through the whole job: planned, loaded, trained, judged and packaged, with a recipe's defaults.

    .venv/bin/python scripts/parity/job_families.py [MODEL_TYPE …] [--set SECTION.KEY=VALUE …]

A tiny random checkpoint of each family with the embedded model's tokenizer trains three steps on the quickstart's data
by `run_recipe`. What the recipe leaves out is as everybody has it: packed, recomputed, the longest batch tried first. A
family passes where every adapter moved, held-out loss is known before and after, answers were written, and the artifact
verifies. `--set` repeats all of it with other settings.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from scripts.parity.family_sweep import ROOT, Row, sweep

__all__ = ["main", "whole_job"]

EMBEDDED = ROOT / "recipes" / "quickstart" / "nano-qwen3moe-2m"
_DATA = ROOT / "recipes" / "quickstart" / "data"
_RECIPE = """
model: {{model_name_or_path: {folder}/model}}
data: {{train: {data}/category.train.jsonl, validation: {data}/category.validation.jsonl, max_samples: 60}}
training: {{output_dir: {folder}/run, max_steps: 3, learning_rate: 1e-2, warmup_steps: 0, use_cpu: true,
  per_device_eval_batch_size: 4, logging_steps: 1}}
eval: {{max_samples: 4, max_new_tokens: 3}}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a family; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="only these families")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="other than by default")
    options = parser.parse_args(arguments)
    return sweep(options.model_types, lambda family, folder: whole_job(family, folder, options.set), "by a whole job")


def whole_job(family: str, folder: Path, overrides: Sequence[str] = ()) -> Row:
    """Train the family in `folder`; what is wrong is told in the row."""
    from rich.console import Console

    from toolkit import load_recipe, run_recipe, verify
    from toolkit.errors import OnecardError

    _build(family, folder / "model")
    (folder / "recipe.yaml").write_text(_RECIPE.format(folder=folder, data=_DATA), encoding="utf-8")
    log = Console(file=io.StringIO(), width=200)
    try:
        finished = run_recipe(load_recipe(folder / "recipe.yaml", list(overrides)), console=log)
        verify(finished.adapter)
    except (OnecardError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        return Row(family, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return _judged(family, json.loads((finished.folder / "summary.json").read_text(encoding="utf-8")))


def _judged(family: str, summary: Mapping[str, Any]) -> Row:
    """What the summary says of coverage, losses and answers."""
    counts, results = summary["counts"], summary["results"]
    moved, adapters = counts["adapters moved"]
    losses = [results[side]["loss"] for side in ("base", "adapted")]
    told = f"{results['training']['steps']} steps, held-out loss {losses[0]:.2f} to {losses[1]:.2f}"
    uncovered = [name for name, count in counts.items() if isinstance(count, list) and count[0] != count[1]]
    wrong = f"{uncovered[0]}: {counts[uncovered[0]]}" if uncovered else ""
    if not all(map(math.isfinite, losses)) or not summary["samples"]:
        wrong = f"held-out losses {losses}, {len(summary['samples'])} answers"
    return Row(family, moved=moved, adapters=adapters, off=0.0, told=told, failed=wrong)


def _build(family: str, folder: Path) -> None:
    """A random checkpoint with room for the embedded model's tokens, and its tokenizer beside it."""
    from transformers import AutoTokenizer

    from tests.harness.families import build, tiny_config

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    config = tiny_config(family)
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        fields = part.to_dict()
        changed = {name: len(tokenizer) for name in fields if "vocab_size" in name and isinstance(fields[name], int)}
        for name, value in changed.items():
            setattr(part, name, value)
    build(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
