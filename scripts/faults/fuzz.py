"""Random and hostile input for everything that reads what others wrote: no traceback, no hang, no memory.

    python -m scripts.faults.fuzz [--inputs N] [--seed S] [TARGET …]

Each input is a mutation of a good one: bytes flipped, cut, doubled or replaced by fragments that have broken parsers;
values of JSON exchanged for hostile ones; parts of templates exchanged. Each must be accepted or refused with an error
of ours in one line, within two seconds of processor time and one GiB of memory beyond what the libraries take.

Inputs are read in a worker process, so that a crash or a hang inside C is seen as well, and its input named. The same
number of the same seed is the same input. Prints a line a target and each failing input; exits with 1 where there is
one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from scripts.faults.targets import TARGETS, Target
from toolkit.errors import OnecardError

__all__ = ["MOST_BYTES", "MOST_SECONDS", "Found", "fuzz", "mutated"]

MOST_SECONDS = 2
MOST_BYTES = 1 << 30
_PATIENCE = 120.0
"""Seconds of no answer, on a machine that does something else, after which a worker is taken to wait for ever."""
_A_WORKER = 5000
"""Inputs that one worker reads: what leaks shows as memory, and what one input leaves behind does not reach far."""
_AT_ONCE = 250
"""Answers that a worker sends together; where it dies before, its inputs are read again with one answer each."""
_EVERY = 250
"""One input in so many goes the whole way where a target has a short cut."""
_SHORT_SECONDS = 0.25
"""What the short cut takes at most; the whole way then tells what becomes of that input."""


@dataclass
class Found:
    """What came of one target; `slowest` in seconds of processor time."""

    inputs: int = 0
    refused: int = 0
    whole: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


class _Hang(BaseException):
    pass


def mutated(target: Target, seed: int, number: int) -> bytes:
    """The input of this number."""
    chance = random.Random(f"{target.name} {seed} {number}")
    return chance.choice(target.mutations)(chance.choice(target.seeds), chance)


def fuzz(target: Target, inputs: int, seed: int = 0) -> Found:
    """Read `inputs` mutations of the target's seeds, the same ones for the same `seed`."""
    found, whole, at_once = Found(), False, _AT_ONCE
    while found.inputs < inputs:
        first = found.inputs
        numbers = range(first, first + 1 if whole else min(inputs, first + (_A_WORKER if at_once > 1 else _AT_ONCE)))
        died = None
        for answer in _answers(target, numbers, seed, whole, at_once):
            if isinstance(answer, str):
                died = answer
                break
            _count(found, answer)
        if died and at_once > 1:
            at_once = 1  # once more, to see at which input
            continue
        if died and (whole or target.whole is None):
            data = mutated(target, seed, found.inputs)
            _count(found, {"seconds": 0.0, "failure": f"input {found.inputs}: {died}: {data[:300]!r}"})
        whole = bool(died) and not whole and target.whole is not None
        at_once = 1 if died else _AT_ONCE
    return found


def _count(found: Found, answer: dict[str, Any]) -> None:
    found.inputs += 1
    found.refused += answer.get("refused", False)
    found.whole += answer.get("whole", False)
    found.slowest = max(found.slowest, answer["seconds"])
    if "failure" in answer:
        found.failures.append(answer["failure"])


def _answers(target: Target, numbers: range, seed: int, whole: bool, at_once: int) -> Iterator[dict[str, Any] | str]:
    """What a worker says of each input, in order; a text where it died or never answered."""
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        gc.collect()
        gc.freeze()
        worker = os.fork()
    if worker == 0:
        os.close(ours)
        _work(target, numbers, seed, whole, at_once, theirs)
    os.close(theirs)
    answered = 0
    with os.fdopen(ours, "rb", buffering=0) as stream:
        rest = b""
        while select.select([stream], [], [], _PATIENCE)[0] and (piece := stream.read(1 << 16)):
            *lines, rest = (rest + piece).split(b"\n")
            answered += len(lines)
            yield from map(json.loads, lines)
        if answered < len(numbers):
            os.kill(worker, signal.SIGKILL) if not _has_ended(worker) else None
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    gc.unfreeze()
    if answered < len(numbers):
        yield f"a crash or a hang that ended the process ({signal.Signals(-code).name if code < 0 else code})"


def _has_ended(worker: int) -> bool:
    return os.waitid(os.P_PID, worker, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _work(target: Target, numbers: range, seed: int, whole: bool, at_once: int, pipe: int) -> None:
    """In the worker: an answer for each number, then out."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.signal(signal.SIGPROF, _raise_hang)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        kept = b""
        for number in numbers:
            data = mutated(target, seed, number)
            answer = None
            if not whole and (target.whole is None or number % _EVERY):
                answer = _try_one(target.read, data, number, _SHORT_SECONDS if target.whole else MOST_SECONDS)
            if target.whole and (answer is None or "failure" in answer):
                answer = {**_try_one(target.whole, data, number, MOST_SECONDS), "whole": True}
            kept += json.dumps(answer).encode() + b"\n"
            if (number + 1 - numbers.start) % at_once == 0 or number + 1 == numbers.stop:
                kept = kept[os.write(pipe, kept) :]
    finally:
        os._exit(0)


def _try_one(read: Callable[[bytes], object], data: bytes, number: int, most: float) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    began = time.process_time()
    # C does not ask for signals: there the kernel ends the process a little later.
    resource.setrlimit(resource.RLIMIT_CPU, (int(began + most) + 2, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, most)
    try:
        read(data)
    except OnecardError as error:
        answer["refused"] = True
        if "\n" in str(error).strip():
            answer["failure"] = f"more than one line: {str(error)[:200]!r}"
    except _Hang:
        answer["failure"] = f"a hang of more than {most} s"
    except Exception:
        last = traceback.format_exc().splitlines()
        answer["failure"] = f"{last[-1][:200]} at {last[-3].strip()[:160]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    answer["seconds"] = time.process_time() - began
    if answer["seconds"] > most and "failure" not in answer:
        answer["failure"] = f"{answer['seconds']:.1f} s"
    if "failure" in answer:
        answer["failure"] = f"input {number}: {answer['failure']}: {data[:300]!r}"
    return answer


def _raise_hang(number: int, frame: FrameType | None) -> None:
    raise _Hang


def main() -> int:
    """Fuzz the chosen targets, each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], metavar="TARGET")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    if len(names) == 1:
        return _measure(names[0], options.inputs, options.seed)
    command = [sys.executable, "-m", "scripts.faults.fuzz", f"--inputs={options.inputs}", f"--seed={options.seed}"]
    return max(subprocess.run([*command, name], check=False).returncode for name in names)


def _measure(name: str, inputs: int, seed: int) -> int:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    began = time.perf_counter()
    try:
        found = fuzz(TARGETS[name](folder), inputs, seed)
    finally:
        shutil.rmtree(folder)
    print(
        f"{name:20} {found.inputs} inputs in {time.perf_counter() - began:.0f} s, {found.refused} refused, "
        + (f"{found.whole} the whole way, " if found.whole else "")
        + f"slowest {found.slowest:.2f} s, {len(found.failures)} failures",
        *found.failures[:8],
        sep="\n  ",
        flush=True,
    )
    return int(bool(found.failures))


if __name__ == "__main__":
    sys.exit(main())
