"""Long-lived worker processes that take turns, so that rivals run in their own memory but never at the same time.

A worker answers one JSON line with another. Speed is measured with glibc told to keep freed memory, for every arm
alike; memory with glibc's defaults. `timeit` and `multiprocessing` know neither a second environment nor turns.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

__all__ = [
    "Summary",
    "Worker",
    "WorkerEndedError",
    "alternate",
    "anonymous",
    "most_anonymous",
    "serve",
    "settled",
    "step_memory",
    "summary",
    "turn",
]

KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "17179869184",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
Summary = dict[str, float]


class WorkerEndedError(RuntimeError):
    """A worker ended instead of answering."""


class Worker:
    """A process that runs `program` under `python` and answers questions one at a time.

    `own` workers may import what this process finds by PYTHONPATH; the others only what is installed there. Where
    memory runs out the kernel is asked to end a `greedy` one and no other.
    """

    def __init__(
        self,
        python: str,
        program: Path,
        *,
        threads: int,
        tuned: bool,
        own: bool = False,
        arguments: Sequence[str] = (),
        greedy: bool = False,
    ) -> None:
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("MALLOC_", "OMP_", "MKL_")) and (own or not key.startswith("PYTHON"))
        }
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-W", "ignore", str(program), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=tempfile.gettempdir(),
            env={**kept, **offline, **(KEEP_FREED_MEMORY if tuned else {})},
        )
        if greedy:
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000")

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer; an exception in the worker is raised here with its last lines."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            ended = "".join(["a worker ended\n", *self._log.readlines()[-12:]])
            if self._process.wait() == -signal.SIGKILL:
                ended += "it was killed, most likely since memory ran out"
            raise WorkerEndedError(ended)
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise RuntimeError(f"a worker said what is no answer: {line.strip()}") from None
        return answer

    def most_anonymous(self, **question: Any) -> int:
        """The most bytes of anonymous memory that the worker holds while it answers."""
        with most_anonymous(self._process.pid) as most:
            self.ask(**question)
        return most[0]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process, self._log:
            pass  # closes its stdin, which ends it, and waits


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """The worker's side: answer each line of stdin. What libraries print goes to stderr."""
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        replies.write(json.dumps(answer(**json.loads(line))) + "\n")
        replies.flush()


def turn(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: the first place goes round, and every second round runs backwards."""
    start = number % len(names)
    order = [*names[start:], *names[:start]]
    return order if number % 2 == 0 else order[::-1]


def alternate(
    arms: Mapping[str, Callable[[], float]], repeats: int, may_end: Collection[str] = ()
) -> dict[str, list[float]]:
    """Each arm's figures, after one round that is not counted. Progress goes to stderr.

    An arm that `may_end` and whose worker does is left out from there on.
    """
    figures: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, repeats):
        for name in turn(list(figures), number):
            try:
                figure = arms[name]()
            except WorkerEndedError as ended:
                if name not in may_end:
                    raise
                print(f"{name}: left out, {str(ended).splitlines()[-1]}", file=sys.stderr, flush=True)
                del figures[name]
                continue
            print(f"round {number + 1} of {repeats}: {name} {figure:.3f} s", file=sys.stderr, flush=True)
            if number >= 0:
                figures[name].append(figure)
    return figures


def summary(figures: Sequence[float]) -> Summary:
    """Median, least and most."""
    return {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}


def settled() -> int:
    """This process's resident bytes once nothing freed is held back; its high-water mark starts anew from there."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def step_memory(step: Callable[[], object]) -> int:
    """Bytes by which a step raises the resident set at its highest point, measured on the second run of it."""
    step()
    before = settled()
    step()
    return _status("VmHWM") - before


@contextmanager
def most_anonymous(pid: int) -> Iterator[list[int]]:
    """Watches a process's anonymous bytes (mapped files are the page cache's, not its own); the most seen, in a list.

    Looks every five milliseconds, from outside: a thread of its own would have to wait for its interpreter lock.
    """
    most, ended = [0], Event()

    def watch() -> None:
        while not ended.wait(0.005):
            most[0] = max(most[0], anonymous(pid))

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def anonymous(pid: int | str) -> int:
    """Anonymous resident bytes of a process, 0 once it has ended."""
    try:
        return _status("RssAnon", pid)
    except (OSError, StopIteration):
        return 0


def _status(field: str, pid: int | str = "self") -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
