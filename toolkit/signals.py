"""SIGTERM and SIGINT: the first one stops the run at the next step boundary, saved; the second one at once.

Schedulers and people stop runs with signals; Python's default tears a step apart. Leaving at once is safe because
everything that is kept appears whole or not at all (`toolkit.durable`).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from toolkit.errors import InterruptedRunError, PreemptedError
from toolkit.ranks import all_gather

__all__ = ["StopRequest", "signals_heeded"]

_AGAIN = "rerun the same command to go on"
_SHOW_CURSOR = "\x1b[?25h"


class StopRequest:
    """Whether somebody asked the run to stop, and how it leaves."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._waits = False
        self._owner = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self._number is not None

    def requested_anywhere(self) -> bool:
        """Whether a signal came to any process of the run, which is then taken for this one's; all must ask."""
        self._number = max(number or 0 for number in all_gather(self._number)) or None
        return self.requested

    @contextmanager
    def until_saved(self) -> Iterator[None]:
        """Within the block a first signal waits for `leave`; outside of it there is nothing to save."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def leave(self, how: str) -> None:
        """Raise the error of the signal that came, if one did.

        Raises:
            PreemptedError: after SIGTERM, exit code 75. InterruptedRunError: after SIGINT, exit code 130.
        """
        if self._number == signal.SIGTERM:
            raise PreemptedError(f"SIGTERM: {how}; {_AGAIN}")
        if self._number is not None:
            raise InterruptedRunError(f"interrupted: {how}; {_AGAIN}")

    def heed(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Worker processes inherit it and leave the decision to their parent."""
        if os.getpid() != self._owner:
            return
        name = signal.Signals(number).name
        if self._waits and self._number is None:
            self._number = number
            _say(f"{name}: saving after this step, then leaving; once more leaves at once")
            return
        code = PreemptedError.exit_code if number == signal.SIGTERM else InterruptedRunError.exit_code
        _say(f"{name}: leaving at once; {_AGAIN}")
        if self._number is not None:
            # In the middle of anything: no handler of anybody else may hold this up.
            os._exit(code)
        raise SystemExit(code)


@contextmanager
def signals_heeded() -> Iterator[StopRequest]:
    """A `StopRequest` that receives SIGTERM and SIGINT within the block."""
    stop = StopRequest()
    before: dict[int, Any] = {number: signal.signal(number, stop.heed) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    """Straight to the descriptor: a signal may come while a stream is locked."""
    cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
    os.write(2, f"{cursor}onecard: {line}\n".encode())
