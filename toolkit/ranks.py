"""Several processes of one run, one a card, as `accelerate launch` or `torchrun` start them: which one this is.

Accelerate divides the batches and joins the gradients. What it cannot know is that everything a run keeps is written by
one process, and that the others wait for what they read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from toolkit.errors import OnecardError, ResourceError

__all__ = ["all_gather", "broadcast", "first_one_first", "is_first", "join", "processes"]

_Told = TypeVar("_Told")

_PATIENCE = timedelta(hours=6)
"""How long processes wait for each other: error compensation of a large base takes hours on one of them."""


def processes() -> int:
    """How many processes this run has, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes, prints and evaluates."""
    return int(os.environ.get("RANK", "0")) == 0


def join(device: str) -> None:
    """Take this process's card and meet the others; nothing where it is alone. `device` is cpu or cuda.

    Raises:
        ResourceError: Accelerate met fewer than the launcher started, so each would train for itself.
    """
    if processes() > 1:
        from accelerate import PartialState

        met = PartialState(cpu=device == "cpu", timeout=_PATIENCE).num_processes
        if met != processes():
            raise ResourceError(f"processes: {processes()} were started, {met} met; use accelerate launch")


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


def all_gather(here: _Told) -> list[_Told]:
    """What each process has `here`, in all of them."""
    if processes() == 1:
        return [here]
    from accelerate.utils import gather_object

    told: list[_Told] = gather_object([here])
    return told
