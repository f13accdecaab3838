"""Which part of a verb is at work, for how long, and how far it is: told on the console, kept for the report.

A verb opens a `Steps` on its console; any room then says `with part("calibrate")` and `advance(done, total, "layers")`
without knowing who listens, so no function carries a callback for it. With nobody listening both do nothing. Libraries
of progress bars draw; none of them times nested parts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["Steps", "advance", "current", "listen", "listening", "part", "seconds_by_part"]

_PLAIN_SECONDS = 5.0
_WORTH_A_LINE = 1.0


class Steps:
    """What has been done so far: seconds by part, a part within a part counted once, in the inner one."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self._open: list[_Part] = []

    def begin(self, name: str, drawn: bool = True) -> None:
        """A part starts; one that was open waits. One that is not `drawn` shows how far it is itself."""
        if self._open:
            self._open[-1].rest()
        self._open.append(_Part(name, self.console, drawn))
        self._open[-1].draw()

    def end(self, *, failed: bool = False) -> None:
        """The innermost part is over; one that failed is told by its error alone."""
        done = self._open.pop()
        done.rest()
        spent = time.perf_counter() - done.began
        if self._open:
            self._open[-1].inside += spent
            self._open[-1].draw()
        own = spent - done.inside
        self.seconds[done.name] = self.seconds.get(done.name, 0.0) + own
        if own >= _WORTH_A_LINE and not failed:
            self.console.print(f"{done.name}: {own:.1f} s", style="dim", highlight=False)

    def advance(self, done: float, total: float, unit: str) -> None:
        """So many of the innermost part's units are done, of how many where that is known (else 0)."""
        if self._open:
            self._open[-1].show(done, total, unit)


class _Part:
    """One part under way: a live line on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, name: str, console: Console, drawn: bool) -> None:
        self.name, self.console, self.drawn = name, console, drawn
        self.inside = 0.0
        self.began = self._printed = time.perf_counter()
        self._bar: Progress | None = None
        self._text, self._done, self._total = name, 0.0, 0.0

    def show(self, done: float, total: float, unit: str) -> None:
        """Rate and time left."""
        now = time.perf_counter()
        rate = done / max(1e-9, now - self.began - self.inside)
        of = f" of {_amount(total, unit)}" if total else ""
        left = f", ETA {(total - done) / max(1e-9, rate):.0f} s" if total else ""
        self._text = f"{self.name} {_amount(done, unit)}{of}{_words(unit)}, {_amount(rate, unit, exact=False)}/s{left}"
        self._done, self._total = done, total
        if self.console.is_terminal:
            self.draw()
        elif now - self._printed >= _PLAIN_SECONDS:
            self._printed = now
            self.console.print(self._text, highlight=False)

    def draw(self) -> None:
        """The live line as it stands; before anything is counted it only shows that time goes by."""
        if not (self.console.is_terminal and (self.drawn or self._total)):
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        if self._bar is None:
            columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
            self._bar.add_task(self._text, total=None)
            self._bar.start()
        total = self._total or None
        self._bar.update(self._bar.task_ids[0], completed=self._done, total=total, description=self._text)

    def rest(self) -> None:
        """Take the live line away."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def _amount(count: float, unit: str, *, exact: bool = True) -> str:
    """A count, or bytes in what they are read in."""
    if unit != "bytes":
        return f"{count:.0f}" if exact else f"{count:.3g}"
    power = 3 if count >= 1e9 else 2
    return f"{count / 1000**power:.1f} {'GB' if power == 3 else 'MB'}"


def _words(unit: str) -> str:
    return "" if unit == "bytes" else f" {unit}"


_listening: ContextVar[Steps | None] = ContextVar("steps", default=None)


def listen(console: Console) -> Steps:
    """From now on, in this context, parts are told on this console."""
    steps = Steps(console)
    _listening.set(steps)
    return steps


@contextmanager
def listening(console: Console) -> Iterator[None]:
    """In the block parts are told on this console, unless somebody listens already."""
    if _listening.get() is not None:
        yield
        return
    token = _listening.set(Steps(console))
    try:
        yield
    finally:
        _listening.reset(token)


def current() -> Steps | None:
    """Who listens in this context, to be told from another thread."""
    return _listening.get()


@contextmanager
def part(name: str, *, drawn: bool = True) -> Iterator[None]:
    """A part of the verb, also as a decorator of the function that does it.

    `drawn` is False for one that has a display of its own, or whose libraries do.
    """
    steps = _listening.get()
    if steps is None:
        yield
        return
    steps.begin(name, drawn)
    try:
        yield
    except BaseException:
        steps.end(failed=True)
        raise
    steps.end()


def advance(done: float, total: float, unit: str) -> None:
    """Say how far the innermost part is; the unit `bytes` is shown in MB and GB, a total of 0 is unknown."""
    if steps := _listening.get():
        steps.advance(done, total, unit)


def seconds_by_part() -> dict[str, float]:
    """Seconds of each part that is over, in the order of their ends; empty where nobody listens."""
    steps = _listening.get()
    return dict(steps.seconds) if steps else {}
