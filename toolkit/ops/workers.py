"""Compute side by side, collect in order: one thread a core, each with one-thread matrix products.

Two threads inside each small product lose to two products side by side. What the products are added to is touched in
task order only, so the result has the same bits on any number of threads. `concurrent.futures.Executor.map` would keep
all results until the end; here each is collected as soon as those before it are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Generic, TypeVar

import torch

__all__ = ["run_in_order"]

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_in_order(
    tasks: Sequence[Task],
    compute: Callable[[Task], Result],
    collect: Callable[[Task, Result], None],
    *,
    parallel: bool = True,
) -> None:
    """`collect(task, compute(task))` for every task, `collect` in task order and never twice at a time.

    Args:
        parallel: compute on as many threads as torch has intra-op threads, each computing on one; false on devices
            that order the work themselves. Gradients are off in `compute` unless it switches them on.

    The first exception of any thread is raised here, once all have stopped.
    """
    threads = min(torch.get_num_threads(), len(tasks)) if parallel else 1
    line, inference = _OrderedTasks(tasks, compute, collect), torch.is_inference_mode_enabled()
    if threads <= 1:
        line.work(inference)
        return
    with _one_thread_a_product():
        others = [_pool(threads - 1).submit(line.work, inference) for _ in range(threads - 1)]
        try:
            line.work(inference)
        finally:
            line.stop()
            for other in others:
                other.exception()  # waits; what failed is raised below
        for other in others:
            other.result()


class _OrderedTasks(Generic[Task, Result]):
    """Tasks handed out one by one, results let through in order."""

    def __init__(
        self, tasks: Sequence[Task], compute: Callable[[Task], Result], collect: Callable[[Task, Result], None]
    ) -> None:
        self._tasks, self._compute, self._collect = tasks, compute, collect
        self._next = itertools.count()
        self._early: dict[int, Result] = {}
        self._turn = 0
        self._lock = Lock()
        self._stopped = False

    def stop(self) -> None:
        """No further task is begun."""
        self._stopped = True

    def work(self, inference: bool) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while not self._stopped and (number := next(self._next)) < len(self._tasks):
                try:
                    self._deliver(number, self._compute(self._tasks[number]))
                except BaseException:
                    self.stop()
                    raise

    def _deliver(self, number: int, result: Result) -> None:
        with self._lock:
            self._early[number] = result
            while self._turn in self._early:
                self._collect(self._tasks[self._turn], self._early.pop(self._turn))
                self._turn += 1


@contextmanager
def _one_thread_a_product() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="onecard-experts")


# Threads do not survive a fork, so a child makes its own.
os.register_at_fork(after_in_child=_pool.cache_clear)
