"""The pictures of the benchmarks, as SVG: bars with their spread, and curves of time against work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "onecard"  # the same figures draw the same bytes

from matplotlib import pyplot as plt  # noqa: E402

__all__ = ["jobs", "layers", "scaling"]

COLORS = {"ours": "#1f77b4", "stock": "#d62728", "experts4bit-qlora": "#2ca02c"}
AXES = {"tokens": "tokens T", "experts": "experts E, 8 a token", "rank": "rank R"}
GREY = "#999999"


def layers(result: Mapping[str, Any], target: Path) -> None:
    """Seconds of a step of each arm, a panel a shape."""
    panels = [(each["shape"]["name"], each["seconds"]) for each in result["shapes"]]
    _bars(panels, "seconds, forward and backward", target)


def jobs(result: Mapping[str, Any], target: Path) -> None:
    """Real tokens a second of each arm, a panel a checkpoint."""
    panels = [(name, each["tokens_per_second"]) for name, each in result["checkpoints"].items()]
    _bars(panels, "real tokens a second", target)


def _bars(panels: list[tuple[str, Mapping[str, Mapping[str, float]]]], what: str, target: Path) -> None:
    rows = max(len(arms) for _, arms in panels)
    figure, every = plt.subplots(
        len(panels), 1, figsize=(8, len(panels) * (0.6 + 0.3 * rows)), layout="constrained", squeeze=False
    )
    for axes, (title, found) in zip(every[:, 0], panels, strict=True):
        arms = {name: figures for name, figures in found.items() if name != "sgemm"}
        medians = [each["median"] for each in arms.values()]
        spread = [[each["median"] - each["min"] for each in arms.values()],
                  [each["max"] - each["median"] for each in arms.values()]]  # fmt: skip
        bars = axes.barh(list(arms), medians, xerr=spread, color=[_color(name) for name in arms], ecolor="#444444")
        axes.bar_label(bars, fmt="%.3g", padding=4)
        axes.set_title(title, loc="left", fontsize="medium")
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    every[-1, 0].set_xlabel(what)
    _save(figure, target)


def scaling(result: Mapping[str, Any], target: Path) -> None:
    """Seconds of a step against T, E and R."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for axes, (axis, label) in zip(panels, AXES.items(), strict=True):
        points = result["scaling"][axis]
        for name in next(iter(points.values())):
            steps = [each[name] for each in points.values()]
            medians = [step["median"] for step in steps]
            values = [int(value) for value in points]
            axes.plot(values, medians, marker="o", color=_color(name), label=name)
            axes.fill_between(
                values, [s["min"] for s in steps], [s["max"] for s in steps], color=_color(name), alpha=0.2, linewidth=0
            )
        axes.set(xlabel=label, ylim=(0, None), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds, forward and backward")
    panels[0].legend(frameon=False)
    _save(figure, target)


def _color(name: str) -> str:
    return next((color for key, color in COLORS.items() if name.startswith(key) and "frozen" not in name), GREY)


def _save(figure: Any, target: Path) -> None:
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)
