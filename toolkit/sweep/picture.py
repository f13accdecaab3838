"""A sweep as a picture: one bar a trial, best first, or a curve a value where two keys are varied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.durable import write_text
from toolkit.sweep.run import Outcome, best_first

__all__ = ["draw"]


def draw(outcomes: Sequence[Outcome], metric: str, target: Path) -> None:
    """Write the trials' figure `metric` to `target` (SVG); trials without it are left out.

    Two varied keys with numbers in the first give a curve for each value of the second; anything else gives bars.
    """
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [outcome for outcome in best_first(outcomes, metric) if metric in outcome.figures]
    figure = Figure(figsize=(7, max(2.5, 0.35 * len(shown) + 1)), layout="constrained")
    axes = figure.subplots()
    keys = list(shown[0].trial.values) if shown else []
    if len(keys) == 2 and all(_number(outcome.trial.values[keys[0]]) is not None for outcome in shown):
        _curves(axes, shown, metric, keys)
    else:
        _bars(axes, shown, metric)
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "onecard", "svg.fonttype": "none"}):  # the same sweep draws the same bytes
        figure.savefig(stream, format="svg", metadata={"Date": None, "Title": f"{metric} of {len(shown)} trials"})
    write_text(target, stream.getvalue())


def _curves(axes: Any, shown: Sequence[Outcome], metric: str, keys: Sequence[str]) -> None:
    first, second = keys
    for value in dict.fromkeys(outcome.trial.values[second] for outcome in shown):
        points = sorted(
            (_number(outcome.trial.values[first]), outcome.figures[metric])
            for outcome in shown
            if outcome.trial.values[second] == value
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{second}={value}")
    axes.set(xlabel=first, ylabel=metric)
    axes.legend(frameon=False)


def _bars(axes: Any, shown: Sequence[Outcome], metric: str) -> None:
    axes.barh([outcome.trial.name for outcome in shown], [outcome.figures[metric] for outcome in shown])
    axes.invert_yaxis()
    axes.set(xlabel=metric)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
