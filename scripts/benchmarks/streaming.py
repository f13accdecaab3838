#!/usr/bin/env python3
"""A training step with a growing share of the expert layers streamed from a cold file, against all of them resident.

    .venv/bin/python scripts/benchmarks/streaming.py FOLDER [--layers 8] [--tokens 512] [--smaller N]
        [--out docs/benchmarks]

Makes once, in FOLDER, a checkpoint with layers of the Qwen3-30B-A3B's shape (scripts/make_qwen3_30b_shape.py). The
file's pages are dropped from the page cache before every step, so that what is streamed comes from the disk. Steps run
on all threads with a fixed batch; losses and gradients of every share must be the resident ones to the last bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.benchmarks.large_step import disk_rate, drop_cache
from scripts.make_qwen3_30b_shape import write
from toolkit.adapters import attach_lora
from toolkit.architecture import describe
from toolkit.checkpoint.config import skeleton
from toolkit.offload.attach import load_streamed, stream_of
from toolkit.offload.place import spread
from toolkit.ops import keep_up_outputs
from toolkit.quant import load_int8

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def step(model: nn.Module, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds of forward and backward without the head's part, and the loss with a sum of the gradients."""
    model.zero_grad()
    start = time.perf_counter()
    loss = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state.square().mean()  # type: ignore[operator, union-attr]
    loss.backward()
    seconds = time.perf_counter() - start
    found = [loss.detach(), *(p.grad.double().abs().sum() for p in model.parameters() if p.grad is not None)]
    return seconds, torch.stack([value.double() for value in found])


def arm(folder: Path, share: float, ids: torch.Tensor, rounds: int) -> tuple[dict[str, Any], torch.Tensor]:
    """One share: the median step, what moved in it, and its numbers."""
    names = [layer.name for layer in describe(skeleton(str(folder))).layers]
    count = round(share * len(names))
    placement = spread(dict.fromkeys(names, 1), count, "disk")
    model = load_streamed(str(folder), placement)[0] if count else load_int8(str(folder))[0]
    torch.manual_seed(0)
    adapted = attach_lora(model, r=8)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    keep_up_outputs(adapted, True)
    stream, times = stream_of(adapted), []
    step(adapted, ids)  # memory is touched, resident stacks are read
    before = stream.traffic if stream else None
    for _ in range(rounds):
        drop_cache(folder)  # but for what is mapped, the resident stacks
        seconds, numbers = step(adapted, ids)
        times.append(seconds)
    row: dict[str, Any] = {"share": share, "streamed": count, "seconds": sorted(times)[rounds // 2]}
    if stream is not None and before is not None:
        row["bytes_a_step"] = (stream.traffic.bytes - before.bytes) // rounds
        row["waited_a_step"] = (stream.traffic.waited - before.waited) / rounds
    return row, numbers


def draw(result: dict[str, Any], target: Path) -> None:
    """Seconds of a step against the share streamed, and what the copy would add were it not hidden."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    shares = [100 * row["share"] for row in rows]
    resident = rows[0]["seconds"]
    bare = [resident + row.get("bytes_a_step", 0) / result["disk_bytes_per_second"] for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(shares, bare, "--", color="#999999", label="arithmetic, then the disk (nothing hidden)")
    axes.plot(shares, [row["seconds"] for row in rows], "o-", color="#1f77b4", label="measured")
    axes.axhline(resident, color="#2ca02c", linewidth=1, label="all resident")
    axes.set(xlabel="expert layers streamed, %", ylabel="seconds a step", title=result["what"], ylim=(0, None))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    """Make the checkpoint, run every share, compare bits, write figures and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smaller", type=int, default=1, metavar="N", help="the shape's sizes divided, to try it out")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = given.folder / (f"shape-{given.layers}" + (f"-smaller-{given.smaller}" if given.smaller > 1 else ""))
    if not folder.is_dir():
        write(folder, given.layers, torch.float32, given.smaller)
    rate = disk_rate(folder)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    ids = torch.randint(0, 1000, (1, given.tokens), generator=torch.Generator().manual_seed(0))
    rows, resident = [], None
    for share in SHARES:
        row, numbers = arm(folder, share, ids, given.rounds)
        resident = numbers if resident is None else resident
        row["same_bits_as_resident"] = bool(torch.equal(numbers, resident))
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    what = (
        f"{given.layers} layers of Qwen3-30B-A3B's shape{f' / {given.smaller}' if given.smaller > 1 else ''}, "
        f"{given.tokens} tokens, {torch.get_num_threads()} threads, CPU"
    )
    result = {"what": what, "disk_bytes_per_second": rate, "rows": rows}
    print(json.dumps(result, indent=2))
    if given.out:
        (given.out / "streaming.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draw(result, given.out / "streaming.svg")


if __name__ == "__main__":
    main()
