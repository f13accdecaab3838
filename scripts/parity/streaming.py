#!/usr/bin/env python3
"""Twenty steps with every expert layer streamed against twenty with all resident: losses and adapters, bit by bit.

    .venv/bin/python -m scripts.parity.streaming [CHECKPOINT or FAMILY ...] [--steps 20]

Three micro-batches a step: layer-major when streamed, one after the other when resident. A family is one of those that
the tests compare over two steps, with random weights; without a word, all of them and the embedded model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from tests.parity.conftest import EMBEDDED, FAMILIES, random_checkpoint
from tests.parity.test_streaming import load, train


def main() -> None:
    """Train twice for each checkpoint; exits with 1 where a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[EMBEDDED, *FAMILIES])
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    same = True
    for model in given.models:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoint = random_checkpoint(model, folder / model) if model in FAMILIES else Path(model)
            changes = {"gradient_accumulation_steps": 3, "packing": False, "max_steps": given.steps}
            _, losses, adapter = train(load(checkpoint, None), folder / "resident", **changes)
            _, streamed_losses, streamed = train(load(checkpoint, folder), folder / "streamed", **changes)
        equal = sum(torch.equal(tensor, streamed[name]) for name, tensor in adapter.items())
        same &= losses == streamed_losses and equal == len(adapter)
        print(
            f"{checkpoint.name}: {given.steps} steps, losses {losses[1]:.6f} to {losses[-1]:.6f}, "
            f"{'equal' if losses == streamed_losses else 'DIFFERENT'}; {equal} of {len(adapter)} tensors equal"
        )
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
