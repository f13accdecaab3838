"""A sweep's trials: as a picture, one bar a trial, best first, or a curve a value of two keys; and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from toolkit.durable import write_text
from toolkit.sweep.run import Outcome, best_first

__all__ = ["draw", "table"]


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


def table(console: Console, ranked: Sequence[Outcome], metric: str) -> None:
    """One row a trial in the order given: its values, the figure that ranks, the other figures, and what failed."""
    names = dict.fromkeys(name for outcome in ranked for name in outcome.figures)
    columns = [metric, *(name for name in names if name != metric)]
    result = Table(box=None, pad_edge=False)
    for column in (*ranked[0].trial.values, *columns, "seconds", ""):
        result.add_column(column, justify="right" if column else "left", overflow="fold")
    for outcome in ranked:
        figures = [f"{outcome.figures[name]:.4f}" if name in outcome.figures else "" for name in columns]
        # A trial that was finished before took no time now.
        seconds = f"{outcome.seconds:.0f}" if outcome.seconds else "before"
        result.add_row(*outcome.trial.values.values(), *figures, seconds, outcome.error[:80])
    console.print(result)
