#!/usr/bin/env python3
"""Draw a finished run for the README: loss over steps, and exact match before and after.

.venv/bin/python scripts/picture.py runs/quickstart recipes/quickstart/quickstart.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "onecard"  # the same run draws the same bytes

from matplotlib import pyplot as plt  # noqa: E402


def draw(run: Path, target: Path) -> None:
    """Write the picture of the run folder `run` to `target` (SVG)."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "summary.json").read_text())["results"]
    trained = [(entry["step"], entry["loss"]) for entry in metrics if "loss" in entry]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(3, 2), layout="constrained")
    left.plot(*zip(*trained, strict=True), color="#1f77b4", label="training loss")
    for name, color in (("base", "#999999"), ("adapted", "#d62728")):
        left.axhline(results[name]["loss"], color=color, linestyle="--", label=f"held-out, {name}")
    left.set(xlabel="step", ylabel="nats a token", ylim=(0, None))
    left.legend(frameon=False)
    shares = [100 * results[name]["exact_match"] for name in ("base", "adapted")]
    bars = right.barh(["base", "adapted"], shares, color=["#999999", "#d62728"])
    right.bar_label(bars, fmt="%.1f%%", padding=3)
    right.set(
        xlabel=f"exact match on {results['examples']} held-out examples, %", xlim=(0, max(10, 1.25 * max(shares)))
    )
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
