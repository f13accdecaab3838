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

__all__ = ["Steps", "advance", "listen", "part", "seconds_by_part"]

_PLAIN_SECONDS = 5.0
_WORTH_A_LINE = 1.0


class Steps:
    """What has been done so far: seconds by part, a part within a part counted once, in the inner one."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self._open: list[_Part] = []

    def begin(self, name: str) -> None:
        """A part starts; one that was open waits."""
        self._open.append(_Part(name))

    def end(self) -> None:
        """The innermost part is over."""
        done = self._open.pop()
        done.close()
        spent = time.perf_counter() - done.began
        if self._open:
            self._open[-1].inside += spent
        own = spent - done.inside
        self.seconds[done.name] = self.seconds.get(done.name, 0.0) + own
        if own >= _WORTH_A_LINE:
            self.console.print(f"{done.name}: {own:.1f} s", style="dim", highlight=False)

    def advance(self, done: int, total: int, unit: str) -> None:
        """So many of the innermost part's units are done."""
        if self._open:
            self._open[-1].show(self.console, done, total, unit)


class _Part:
    """One part under way: a live line on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inside = 0.0
        self.began = self._printed = time.perf_counter()
        self._bar: Progress | None = None

    def show(self, console: Console, done: int, total: int, unit: str) -> None:
        """Rate and time left."""
        now = time.perf_counter()
        rate = done / max(1e-9, now - self.began)
        left = f"{self.name} {done} of {total} {unit}, {rate:.3g}/s, ETA {(total - done) / max(1e-9, rate):.0f} s"
        if console.is_terminal:
            self._draw(console, done, total, left)
        elif now - self._printed >= _PLAIN_SECONDS:
            self._printed = now
            console.print(left, highlight=False)

    def close(self) -> None:
        """Take the live line away."""
        if self._bar:
            self._bar.stop()

    def _draw(self, console: Console, done: int, total: int, text: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        if self._bar is None:
            self._bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True)
            self._bar.start()
            self._bar.add_task(text, total=total)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=text)


_listening: ContextVar[Steps | None] = ContextVar("steps", default=None)


def listen(console: Console) -> Steps:
    """From now on, in this context, parts are told on this console."""
    steps = Steps(console)
    _listening.set(steps)
    return steps


@contextmanager
def part(name: str) -> Iterator[None]:
    """A part of the verb, also as a decorator of the function that does it."""
    steps = _listening.get()
    if steps is None:
        yield
        return
    steps.begin(name)
    try:
        yield
    finally:
        steps.end()


def advance(done: int, total: int, unit: str) -> None:
    """Say how far the innermost part is."""
    if steps := _listening.get():
        steps.advance(done, total, unit)


def seconds_by_part() -> dict[str, float]:
    """Seconds of each part that is over, in the order of their ends; empty where nobody listens."""
    steps = _listening.get()
    return dict(steps.seconds) if steps else {}
