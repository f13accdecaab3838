#!/usr/bin/env python3
"""An int8 weight times fp32 rows: in three digits on the integer units, and multiplied out for fp32's.

    .venv/bin/python scripts/benchmarks/digits.py [--rows 16 64 256 1024] [--inputs 1024] [--outputs 1536]
        [--repeats 30]

Both in turns on one thread, the second through a buffer that is used again; milliseconds are medians. Errors are
against float64, the largest of all over the largest number.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from turns import turn

from toolkit.ops.split_int8 import can_multiply, multiply


def main() -> None:
    """Measure and print."""
    given = _arguments()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = given.outputs, given.inputs
    stored = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    buffer = torch.empty(shape)
    print(f"{'rows':>6}{'digits ms':>11}{'fp32 ms':>9}{'faster':>8}{'digits err':>12}{'fp32 err':>10}")
    for count in given.rows:
        x = torch.randn(count, given.inputs, generator=generator)
        if not can_multiply(x, stored):
            print("digits.py: too small a weight, or a machine without integer units that torch uses exactly")
            return
        arms: dict[str, Callable[[], torch.Tensor]] = {
            "digits": lambda x=x: multiply(x, stored, transposed=True),
            "fp32": lambda x=x: x @ buffer.copy_(stored).t(),
        }
        exact = x.double() @ stored.double().t()
        errors = {name: float((arm() - exact).abs().max() / exact.abs().max()) for name, arm in arms.items()}
        times: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(given.repeats):
            for name in turn(list(arms), number):
                started = time.perf_counter()
                arms[name]()
                times[name].append(1e3 * (time.perf_counter() - started))
        ours, theirs = (statistics.median(each) for each in times.values())
        print(
            f"{count:6}{ours:11.2f}{theirs:9.2f}{theirs / ours:7.2f}×{errors['digits']:12.1e}{errors['fp32']:10.1e}",
            flush=True,
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--outputs", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args()


if __name__ == "__main__":
    main()
