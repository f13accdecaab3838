"""Runs code with the n-th change of its files failing, or the process killed at it: a preloaded shim, and forks.

The shim (`shim.c`) must be there before the process starts, so drivers are started through `preloaded`. The libraries
are then loaded once, and each fault happens in a fork.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import OnecardError

__all__ = ["FAULTS", "Fault", "Scenario", "Tally", "changes_of", "compiler", "in_fork", "preloaded", "try_every"]

SOURCE = Path(__file__).with_name("shim.c")
_COUNT, _KILL, _ONCE, _ON = range(4)
_CRASHED = 99


@dataclass(frozen=True)
class Fault:
    """What happens at a change: a kill, or an error number, once or from then on."""

    name: str
    action: int
    number: int = 0


FAULTS = (
    Fault("kill", _KILL),
    Fault("ENOSPC", _ON, errno.ENOSPC),
    Fault("EIO", _ONCE, errno.EIO),
)


@dataclass(frozen=True)
class Scenario:
    """Something that writes: `act` is cut short and then done again; `final` must be as if nothing had happened.

    `holds` raises where what is there after the fault is neither the old nor the new state. `below` are the files
    whose changes count, "net" for messages sent instead. With `prepared_once` the files that `prepare` left are copied
    for each fault; they may name their place.
    """

    name: str
    prepare: Callable[[Path], None]
    act: Callable[[Path], object]
    holds: Callable[[Path], None]
    final: Callable[[Path], Any]
    below: Callable[[Path], str] = str
    prepared_once: bool = False


@dataclass
class Tally:
    """How often a fault struck, and what did not recover."""

    changes: int = 0
    struck: int = 0
    failures: list[str] = field(default_factory=list)


def compiler() -> list[str] | None:
    """The command of a C compiler here: the system's, or the one in the `ziglang` package."""
    if found := shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
        return [found]
    try:
        import ziglang  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return None
    return [sys.executable, "-m", "ziglang", "cc"]


def preloaded(arguments: list[str], folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments and the shim, which is compiled into `folder`."""
    library, command = folder / "shim.so", compiler()
    assert command
    subprocess.run([*command, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    return subprocess.run([sys.executable, *arguments], env=environment, text=True, **options)


def changes_of(act: Callable[[], object], below: str) -> int:
    """How many changes `act`, run in a fork, makes below a path."""
    ours, theirs = os.pipe()

    def counted() -> None:
        act()
        os.write(theirs, str(ctypes.CDLL(None).faults_seen()).encode())

    assert in_fork(counted, below, 0, Fault("none", _COUNT)) == 0
    os.close(theirs)
    with os.fdopen(ours) as answer:
        return int(answer.read())


def in_fork(act: Callable[[], object], below: str = "", at: int = 0, fault: Fault | None = None) -> int:
    """Run `act` in a fork; its exit code, or minus the signal that ended it. Errors of ours exit with their code."""
    child = os.fork()
    if child == 0:
        code = _CRASHED
        try:
            if fault:
                ctypes.CDLL(None).faults_arm(below.encode(), at, fault.action, fault.number)
            act()
            code = 0
        except OnecardError as error:
            code = error.exit_code
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def try_every(
    scenario: Scenario,
    fault: Fault,
    folder: Path,
    points: Callable[[int], Iterator[int]],
    told: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Let the fault strike at each of `points(changes)`, and do the work again after each; `told` of each."""
    whole = _fresh(folder / "whole", scenario)
    tally = Tally(changes_of(lambda: scenario.act(whole), scenario.below(whole)))
    expected = scenario.final(whole)
    for at in points(tally.changes):
        place = _fresh(folder / "struck", scenario)
        code = in_fork(lambda place=place: scenario.act(place), scenario.below(place), at, fault)  # type: ignore[misc]
        tally.struck += 1
        what = f"{scenario.name}: {fault.name} at change {at} of {tally.changes}"
        # An error may strike where nothing depends on it, a leftover's removal say; a kill always shows.
        fine = code == -signal.SIGKILL if fault.action == _KILL else code in (0, 4, 5, 7)
        if not fine:
            tally.failures.append(f"{what}: exit code {code}")
        try:
            scenario.holds(place)
            scenario.act(place)
            if scenario.final(place) != expected:
                tally.failures.append(f"{what}: other results after the rerun")
        except (Exception, SystemExit) as error:
            tally.failures.append(f"{what}: {type(error).__name__}: {error}")
        told(tally)
    return tally


def _fresh(place: Path, scenario: Scenario) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    kept = place.with_name(f"{place.name}-prepared")
    if kept.exists():
        shutil.copytree(kept, place)
        return place
    place.mkdir(parents=True)
    scenario.prepare(place)
    if scenario.prepared_once:
        shutil.copytree(place, kept)
    return place
