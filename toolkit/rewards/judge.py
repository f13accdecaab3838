"""Rewards of written answers, asked of a process that may fail: what raises, hangs or gives no number costs one line.

`concurrent.futures` and `multiprocessing` send pickles, and cannot end a call that hangs. Here the process is ended
with all that it started, and the next batch has a new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from toolkit.errors import RecipeError

__all__ = ["Asked", "Judge", "Reward", "Scores"]

_LOADING = 120.0
"""Seconds that importing the user's files may take: some import torch."""
_MOST_REPLY = 64 << 20
"""Bytes of a reply."""
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Reward:
    """One reward: its short name, the function's (a built-in's, or `file.py:function`), its weight, and options."""

    name: str
    function: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A batch of completions, one item of each list for each.

    Args:
        prompts: lists of messages, or texts. completions: likewise. completion_ids: their tokens.
        texts: what is judged of a completion: without thought and special tokens. answer: what was wanted; None:
            the row has none.
        trainer_state: `global_step`, `max_steps` and `epoch`. columns: further columns of the rows, by name.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    texts: Sequence[str]
    answer: Sequence[str | None]
    trainer_state: Mapping[str, float | None]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Rewards of a batch, by reward and completion (None: it does not apply), figures that functions logged, and a line
    for each reward that failed, whose values are all None."""

    values: tuple[tuple[float | None, ...], ...]
    metrics: Mapping[str, float]
    failures: tuple[str, ...]


class _Failed(Exception):
    """Why there is no reply."""


class Judge:
    """Computes rewards.

    Args:
        rewards: at least one. seconds: that one reward may take for one batch. memory: bytes that their process may
            have. columns: of the rows, which functions will be given; without them their arguments are not checked.
    """

    def __init__(
        self, rewards: Sequence[Reward], *, seconds: float, memory: int, columns: Sequence[str] | None = None
    ) -> None:
        self.rewards, self.seconds, self.memory, self.columns = tuple(rewards), seconds, memory, columns
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Judge] | None = None
        self._unread = bytearray()

    def start(self) -> None:
        """Load the functions.

        Raises:
            RecipeError: one cannot be loaded.
        """
        try:
            self._start()
        except _Failed as failed:
            raise RecipeError(str(failed)) from None

    def close(self) -> None:
        """End the process; the next batch starts another."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def score(self, asked: Asked) -> Scores:
        """Every reward of every completion; a reward that fails has none, and a line says why."""
        values: list[tuple[float | None, ...]] = []
        metrics: dict[str, float] = {}
        failures = []
        count = len(asked.completions)
        for number, reward in enumerate(self.rewards):
            try:
                reply = self._ask(number, asked)
                values.append(_checked(reply, count))
                metrics |= dict(_metrics(reply))
            except _Failed as failed:
                values.append((None,) * count)
                failures.append(f"reward {reward.name}: {failed}")
        return Scores(tuple(values), metrics, tuple(failures))

    def total(self, scores: Scores) -> list[float | None]:
        """The weighted sum of each completion's rewards; None where none applies."""
        weights = [reward.weight for reward in self.rewards]
        found: list[float | None] = []
        for values in zip(*scores.values, strict=True):
            known = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
            found.append(sum(known) if known else None)
        return found

    def _ask(self, number: int, asked: Asked) -> dict[str, Any]:
        if self._process is None or number == 0:
            self._send(asked)
        try:
            self._write({"reward": number})
            reply = self._read(self.seconds, f"took longer than {self.seconds:g} s, rewards.time_limit")
        except _Failed:
            self.close()
            raise
        if "error" in reply:
            raise _Failed(str(reply["error"])[:300])
        return reply

    def _send(self, asked: Asked) -> None:
        if self._process is None:
            self._start()
        self._write({"batch": asdict(asked)})

    def _start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        process = subprocess.Popen(
            [sys.executable, "-m", "toolkit.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._process, self._unread = process, bytearray()
        self._end = weakref.finalize(self, _end, process)
        rewards = [{"function": each.function, "options": dict(each.options)} for each in self.rewards]
        try:
            self._write({"rewards": rewards, "memory": self.memory, "columns": self.columns})
            reply = self._read(_LOADING, f"rewards.functions: importing took longer than {_LOADING:g} s")
        except _Failed:
            self.close()
            raise
        if "error" in reply:
            self.close()
            told, culprit = str(reply["error"]), self.rewards[int(reply["reward"])].function
            raise _Failed(told if told.startswith("rewards.functions") else f"rewards.functions: {culprit}: {told}")

    def _write(self, value: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise _Failed(self._ended()) from None

    def _read(self, seconds: float, late: str) -> dict[str, Any]:
        """The next line that comes, as JSON."""
        assert self._process is not None
        assert self._process.stdout is not None
        until, descriptor = time.monotonic() + seconds, self._process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
                raise _Failed(late)
            found = os.read(descriptor, _CHUNK)
            self._unread += found
            if not found or len(self._unread) > _MOST_REPLY:
                raise _Failed(self._ended() if not found else "wrote what is no reply")
        line, _, rest = bytes(self._unread).partition(b"\n")
        self._unread = bytearray(rest)
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise _Failed("wrote what is no reply")
        return reply

    def _ended(self) -> str:
        """How the process ended by itself."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.returncode
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}; it may have run out of memory"
        return f"its process ended with status {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _checked(reply: Mapping[str, Any], count: int) -> tuple[float | None, ...]:
    values = reply.get("values")
    whole = isinstance(values, list) and len(values) == count
    if not whole or not all(value is None or isinstance(value, (int, float)) for value in values or ()):
        raise _Failed("wrote what is no reply")
    assert isinstance(values, list)
    return tuple(None if value is None else float(value) for value in values)


def _metrics(reply: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    found = reply.get("metrics") or {}
    return ((str(name), float(value)) for name, value in found.items() if isinstance(value, (int, float)))
