#!/usr/bin/env python3
"""Whether a row of an fp32 product has the same bits among any number of rows, on this machine, and what blocks of one
height would cost.

    .venv/bin/python scripts/benchmarks/row_bits.py [--heights 256] [--shapes 1024x16 1024x512] [--repeats 30]

The same row stands at every place of products of 1 to HEIGHTS rows, with a weight [inputs x outputs] as it is stored
and with a transposed one. Times are for HEIGHTS rows (in blocks: as many as fill the last one), on one thread and in
turns, the least of all.
"""

from __future__ import annotations

import argparse
import time

import torch
from turns import turn

_BLOCKS = (16, 48)
"""A multiple of the four or eight rows that most kernels take at a time, and of the six as well."""


def main() -> None:
    """Measure and print."""
    given = _arguments()
    torch.set_num_threads(1)
    print(f"{'product':<16}{'results':>8}{'from 16':>8}{'by place':>9}{'at once ms':>12}{'in 16s':>8}{'in 48s':>8}")
    for shape in given.shapes:
        inputs, outputs = map(int, shape.split("x"))
        weight = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(0))
        for name, each in (("x W", weight), ("x Wt", weight.t().contiguous().t())):
            found = [_results(each, rows) for rows in range(1, given.heights + 1)]
            places = sum(len(results) > 1 for results in found)
            all_of, from_16 = (len(set().union(*some)) for some in (found, found[15::4]))
            once, *blocks = _times(each, given.heights, given.repeats)
            print(
                f"{shape + ' ' + name:<16}{all_of:8}{from_16:8}{places:9}{once:12.2f}"
                + "".join(f"{block / once:7.2f}×" for block in blocks),
                flush=True,
            )


def _results(weight: torch.Tensor, rows: int) -> set[bytes]:
    """What one and the same row gives, at whatever place among so many."""
    row = torch.randn(1, weight.shape[0], generator=torch.Generator().manual_seed(1))
    found = row.expand(rows, -1).contiguous() @ weight
    return {each.numpy().tobytes() for each in found.unique(dim=0)}


def _times(weight: torch.Tensor, rows: int, repeats: int) -> list[float]:
    """Milliseconds of the product at once, and of the same in blocks of each height."""
    x = torch.randn(rows + max(_BLOCKS), weight.shape[0])
    out = torch.empty(len(x), weight.shape[1])
    heights = (rows, *_BLOCKS)
    best = dict.fromkeys(heights, float("inf"))
    for number in range(repeats):
        for height in turn(list(heights), number):
            started = time.perf_counter()
            for first in range(0, rows, height):
                torch.mm(x[first : first + height], weight, out=out[first : first + height])
            best[height] = min(best[height], 1e3 * (time.perf_counter() - started))
    return list(best.values())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].replace("\n", " "))
    parser.add_argument("--heights", type=int, default=256)
    parser.add_argument("--shapes", nargs="+", default=["1024x16", "1024x512"])
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args()


if __name__ == "__main__":
    main()
