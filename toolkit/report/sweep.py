"""A sweep's trials as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from toolkit.sweep import Outcome

__all__ = ["table"]


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
