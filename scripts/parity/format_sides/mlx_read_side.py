"""What mlx-lm computes of checkpoints: its own loader on a Linux CPU, in fp32. Run by merged_checkpoints.py.

    python mlx_read_side.py JOB.json

A job holds `tokens` (ids), `out` and `models`, {name: folder}. OUT/NAME.npz holds `logits`, OUT/NAME.txt an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import load_model

__all__ = ["main"]


def main(job: dict[str, Any]) -> None:
    """Every model of the job, one after the other."""
    for name, folder in job["models"].items():
        out = Path(job["out"]) / name
        try:
            model, _ = load_model(Path(folder))
            model.update(tree_map(_wide, model.parameters()))
            logits = model(mx.array([job["tokens"]]))[0].astype(mx.float32)
            np.savez(out.with_name(f"{name}.npz"), logits=np.array(logits))
        except Exception as error:  # whatever it is, the table tells of it and goes on
            out.with_name(f"{name}.txt").write_text(" ".join(f"{type(error).__name__}: {error}".split())[:300])


def _wide(value: mx.array) -> mx.array:
    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
