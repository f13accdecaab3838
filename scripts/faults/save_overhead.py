"""Seconds of a safe save beside a plain one, over sizes.

    python -m scripts.faults.save_overhead [--repeats N] [--sizes MIB …] [--folder FOLDER]

Plain is what the stock trainer does: straight into the folder, never synced, never read again. Synced is that and an
fsync of each file and of the folders, without which a power cut may take the checkpoint. Safe is ours: written aside,
synced, hashed, renamed, read back. Arms take turns; the disk is idle before each.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from toolkit.durable import sync
from toolkit.training.checkpoint import write_checkpoint

__all__ = ["measure"]

Tensors = dict[str, dict[str, torch.Tensor]]


def _tensors(megabytes: int) -> Tensors:
    """An adapter and AdamW's two moments of it."""
    values = torch.randn(megabytes << 18)
    third = len(values) // 3
    return {
        "adapter_model.safetensors": {"a": values[:third].clone()},
        "optimizer.safetensors": {"o": values[third:].clone()},
    }


def _plain(folder: Path, tensors: Tensors) -> None:
    target = folder / "checkpoint-1"
    target.mkdir()
    for name, content in tensors.items():
        save_file(content, target / name)


def _synced(folder: Path, tensors: Tensors) -> None:
    _plain(folder, tensors)
    for path in (*(folder / "checkpoint-1").iterdir(), folder / "checkpoint-1", folder):
        sync(path)


def _safe(folder: Path, tensors: Tensors) -> None:
    write_checkpoint(folder, 1, tensors=tensors, texts={}, facts={})


ARMS: dict[str, Callable[[Path, Tensors], None]] = {"plain": _plain, "synced": _synced, "safe": _safe}


def measure(folder: Path, megabytes: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm, `repeats` times in turn, after one save of each that does not count."""
    tensors, place = _tensors(megabytes), folder / "timed"
    found: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(repeats + 1):
        for name, save in ARMS.items():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            os.sync()
            began = time.perf_counter()
            save(place, tensors)
            if number:
                found[name].append(time.perf_counter() - began)
    shutil.rmtree(place)
    return found


def main() -> int:
    """Print a line a size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 16, 128, 512], metavar="MIB")
    parser.add_argument("--folder", type=Path, help="on the disk that is meant; a temporary folder otherwise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for megabytes in options.sizes:
            seconds = measure(Path(folder), megabytes, options.repeats)
            arms = (
                f"{name} {statistics.median(each):.3f} s ({min(each):.3f}–{max(each):.3f})"
                for name, each in seconds.items()
            )
            print(f"{megabytes:4} MiB: {', '.join(arms)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
