"""What each of two processes does in `test_several_processes`: a run, cut off after two steps, again, and once more.

At last the first one alone makes a mistake, of which both must hear.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

from toolkit.cli import main
from toolkit.errors import DataError
from toolkit.processes import broadcast, first_one_first, is_first


def train() -> None:
    """`onecard train` with this process's arguments."""
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


def cut_off(run: Path) -> None:
    """Leave of a finished run what a kill after its second step would have left."""
    whole = run.with_name("whole")
    (run / "adapter").rename(whole)
    shutil.copy(run / "metrics.jsonl", whole)
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    (run / "summary.json").unlink()


def mistake() -> None:
    """An error of the first process; only that one may come here."""
    assert is_first()
    raise DataError("only the first one saw it")


if __name__ == "__main__":
    train()
    if is_first():
        cut_off(Path(sys.argv[-1].removeprefix("training.output_dir=")))
    torch.distributed.barrier()
    train()
    train()
    try:
        broadcast(mistake)
    except DataError as error:
        with first_one_first():
            print(f"{os.environ['RANK']}: {error}", flush=True)
