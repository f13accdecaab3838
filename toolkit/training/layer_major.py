"""All micro-batches of an optimizer step through a streamed layer before the next, so that each is read twice a step.

Accelerate runs forward and backward of one micro-batch after the other, which would read every streamed layer twice for
each. Here each micro-batch runs in a thread of its own, one at a time, and stops where it asks for a layer that is not
the one everybody is in. That needs no knowledge of the family, and every parameter's gradients are added in the
micro-batches' order, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition, get_ident
from typing import Generic, TypeVar

import torch

from toolkit.offload.stream import ExpertStream

__all__ = ["LayerMajor"]

Result = TypeVar("Result")


class _Abandoned(BaseException):
    """Unwinds the micro-batches that wait when another one has failed."""


class LayerMajor(Generic[Result]):
    """Runs tasks that use one stream side by side, in layer-major order.

    Args:
        stream: its `gate` is taken while tasks run.
        micro_batches_per_pass: most tasks side by side, whose activations are alive together; the next ones follow.
            None for all.
    """

    def __init__(self, stream: ExpertStream, micro_batches_per_pass: int | None = None) -> None:
        self._stream, self._per_pass = stream, micro_batches_per_pass
        self._turn = Condition()
        self._pool = ThreadPoolExecutor(1)
        self._threads = 1
        self._begin(0)

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Each task's result, in order. The first failure, in task order, is raised once all have stopped.

        A task runs until it asks for another layer than the current one; when all have come so far, the layer that the
        first of them waits for becomes the current one.
        """
        size = self._per_pass or max(1, len(tasks))
        groups = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        return [result for group in groups for result in self._run(group)]

    def _run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        self._begin(len(tasks))
        if len(tasks) > self._threads:
            self._pool, self._threads = ThreadPoolExecutor(len(tasks), "onecard-micro-batch"), len(tasks)
        threads, self._stream.gate = torch.get_num_threads(), self._reach
        try:
            futures = [self._pool.submit(self._task, number, task, threads) for number, task in enumerate(tasks)]
            failed = [error for future in futures if (error := future.exception()) is not None]
        except BaseException:  # interrupted: whoever waits for a turn will not get it
            self._fail()
            raise
        finally:
            self._stream.gate = None
        for error in sorted(failed, key=lambda error: isinstance(error, _Abandoned)):
            raise error
        return [future.result() for future in futures]

    def _begin(self, count: int) -> None:
        self._numbers: dict[int, int] = {}
        self._wanted: list[str | None] = [None] * count
        self._is_done = [False] * count
        self._running, self._layer, self._failed = 0, None, False

    _layer: str | None

    def _task(self, number: int, task: Callable[[], Result], threads: int) -> Result:
        self._numbers[get_ident()] = number
        with self._turn:
            self._await_turn(number)
        try:
            # As many intra-op threads as the caller has. Backward stays in this thread on every device: a card's own
            # backward thread would serve all micro-batches and could not wait for one of them.
            torch.set_num_threads(threads)
            with torch.autograd.set_multithreading_enabled(False):
                return task()
        except BaseException:
            self._fail()
            raise
        finally:
            with self._turn:
                self._is_done[number] = True
                self._pass_on(number)

    def _reach(self, layer: str) -> None:
        """The stream's gate: returns when this thread's micro-batch may go into `layer`."""
        number = self._numbers.get(get_ident())
        if number is None or layer == self._layer:
            return
        with self._turn:
            self._wanted[number] = layer
            self._pass_on(number)
            self._await_turn(number)
            self._wanted[number] = None

    def _fail(self) -> None:
        with self._turn:
            self._failed = True
            self._turn.notify_all()

    def _await_turn(self, number: int) -> None:
        self._turn.wait_for(lambda: self._running == number or self._failed)
        if self._failed:
            raise _Abandoned

    def _pass_on(self, number: int) -> None:
        """To the next task of this round; when there is none, a new round begins with the first one's layer."""
        waiting = [other for other, is_done in enumerate(self._is_done) if not is_done]
        later = [other for other in waiting if other > number and self._wanted[other] in (None, self._layer)]
        if not later and waiting:
            self._layer = self._wanted[waiting[0]]
            later = [other for other in waiting if self._wanted[other] == self._layer]
        self._running = later[0] if later else -1
        self._turn.notify_all()
