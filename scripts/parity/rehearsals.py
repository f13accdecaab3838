"""A plan of every MoE family that the installed transformers has: is its step rehearsed, estimated, or refused?

    .venv/bin/python scripts/parity/rehearsals.py [FAMILY …] [--card]

Each family's default config is shrunk as in the tests, and planned on a CPU (`--card`: on a card), recomputed and kept,
with what evaluation needs; not packed where its layers cannot keep examples apart. A family whose step cannot be
rehearsed is estimated by rule of thumb, and the plan says so.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness.families import families, tiny_config
from toolkit.errors import ModelError, PackingError
from toolkit.plan import Bytes, Device, StepShape
from toolkit.plan.budget import Budget
from toolkit.recipe import parse

__all__ = ["main", "outcome"]

RECIPE = """
model: {{model_name_or_path: '{name}'}}
data: {{train: none}}
training: {{max_length: 64, gradient_checkpointing: {checkpointing}, packing: {packing}}}
eval: {{batch_size: 2, max_new_tokens: 4}}
"""
SHAPE = StepShape(64, 40, 48, 20, 30)


def outcome(model_type: str, *, on_card: bool) -> str:
    """What a plan of this family comes to, in a line that begins with one word."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tiny_config(model_type).save_pretrained(folder)
            kind, dtype, backend = (
                ("cuda", "bfloat16", "onecard_triton") if on_card else ("cpu", "float32", "onecard_per_expert")
            )
            budget = Budget(folder, "main", Device(kind, kind, 1 << 40), dtype, backend, "auto", True, SHAPE)
            how = ""
            try:
                sizes = _sizes(budget, folder, packing="true")
            except PackingError:
                how, sizes = ", not packed", _sizes(budget, folder, packing="false")
        except ModelError as error:
            return f"refused: {str(error).replace(folder, model_type)}"
    if budget.note:
        return f"estimated: {budget.note}"
    activations = ", ".join(f"{size.activations / 2**20:.2f} MiB" for size in sizes)
    return f"rehearsed: {activations} of activations recomputed and kept{how}"


def _sizes(budget: Budget, folder: str, packing: str) -> list[Bytes]:
    recipes = (parse(RECIPE.format(name=folder, checkpointing=how, packing=packing)) for how in ("true", "false"))
    return [budget.bytes(recipe) for recipe in recipes]


def main() -> int:
    """One line a family, and how many of each kind."""
    warnings.simplefilter("ignore")
    chosen = [word for word in sys.argv[1:] if not word.startswith("--")]
    counts: Counter[str] = Counter()
    for family in families():
        if chosen and family.model_type not in chosen:
            continue
        try:
            line = outcome(family.model_type, on_card="--card" in sys.argv)
        except Exception as error:  # what a user would meet as a failure of the plan
            line = f"failed: {type(error).__name__}: {error}"
        counts[line.partition(":")[0]] += 1
        print(f"{family.model_type:28} {' '.join(line.split())[:150]}", flush=True)
    print(", ".join(f"{count} {word}" for word, count in counts.most_common()), f"of {sum(counts.values())} families")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
