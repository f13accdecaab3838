"""The processes of one run, one a card: which one this is, what they tell each other, and how a signal stops them.

Accelerate, which `accelerate launch` or `torchrun` start them with, divides the batches and joins the gradients. What
it cannot know is that everything a run keeps is written by one process, and that the others wait for what they read.
Schedulers and people stop runs with SIGTERM and SIGINT; Python's default tears a step apart. The first signal stops the
run at the next step boundary, saved; the second one at once, which is safe because everything that is kept appears
whole or not at all (`toolkit.durable`).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

from toolkit.errors import InterruptedRunError, OnecardError, PreemptedError, RecipeError, ResourceError

__all__ = [
    "StopRequest",
    "broadcast",
    "first_one_first",
    "is_first",
    "join",
    "processes",
    "require_all_started",
    "signals_heeded",
]

_Told = TypeVar("_Told")

_PATIENCE = timedelta(hours=6)
"""How long processes wait for each other: error compensation of a large base takes hours on one of them."""

_AGAIN = "the same command resumes"
_SHOW_CURSOR = "\x1b[?25h"


def processes() -> int:
    """How many processes this run has, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes, prints and evaluates."""
    return int(os.environ.get("RANK", "0")) == 0


def require_all_started() -> None:
    """Raise `RecipeError` where `accelerate launch --cpu` was asked for several processes: it starts one, and says so
    to nobody. It leaves a meeting place in the environment, and no number of processes."""
    alone = "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ
    if (
        alone
        and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        and "ACCELERATE_MIXED_PRECISION" in os.environ
    ):
        raise RecipeError(
            "accelerate launch --cpu starts one process, whatever --num_processes says: write --multi_gpu in its place "
            "and add training.use_cpu=true; or unset MASTER_ADDR for one"
        )


def join(device: str) -> None:
    """Take this process's card and meet the others; nothing where it is alone. `device` is cpu or cuda.

    Raises:
        ResourceError: Accelerate met fewer than the launcher started, so each would train for itself.
    """
    if processes() > 1:
        from accelerate import PartialState

        met = PartialState(cpu=device == "cpu", timeout=_PATIENCE).num_processes
        if met != processes():
            raise ResourceError(f"processes: {processes()} expected, {met} joined; use accelerate launch")


@contextmanager
def first_one_first() -> Iterator[None]:
    """Run the block in the first process, and only then in the others, which must all come here after `join`.

    They go on where it raises, too: most likely to the same error.
    """
    if not is_first():
        _meet()
    try:
        yield
    finally:
        if is_first():
            _meet()


def _meet() -> None:
    """Wait until every process is here."""
    if processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def broadcast(find: Callable[[], _Told]) -> _Told:
    """What `find` gives in the first process, in all of them; it is called nowhere else.

    Raises:
        OnecardError: what `find` raised there, in all of them.
    """
    if processes() == 1:
        return find()
    from accelerate.utils import broadcast_object_list

    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = find()
        except OnecardError as error:
            told[1] = error
    found, wrong = broadcast_object_list(told)
    if wrong is not None:
        raise wrong
    result: _Told = found
    return result


def _all_gather(here: _Told) -> list[_Told]:
    """What each process has `here`, in all of them."""
    if processes() == 1:
        return [here]
    from accelerate.utils import gather_object

    told: list[_Told] = gather_object([here])
    return told


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
        self._number = max(number or 0 for number in _all_gather(self._number)) or None
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
            _say(f"{name}: will save after this step, then exit; repeat to exit at once")
            return
        code = PreemptedError.exit_code if number == signal.SIGTERM else InterruptedRunError.exit_code
        _say(f"{name}: exiting at once; {_AGAIN}")
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
