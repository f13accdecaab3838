"""Kills `onecard train` at random moments until it has been killed often enough, and compares what comes of it.

    python -m scripts.faults.random_kills [--kills 200]

Every run is started again, with the same command and no other step, until it ends by itself; its losses, its adapter
and the files in its folder must then be those of a run that was never killed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from scripts.faults.kill_points import run_results, spare_pictures, train_run

__all__ = ["kill_at_random"]


_FORKED = "Invalid thread pool!"
"""torch's word for a fork of a process with threads, now and then: it is no fault of the run, which is begun again."""


def kill_at_random(place: Path, longest: float, chance: random.Random) -> int:
    """Start the run until it ends; gives how often it was killed. Raises where it ends with an error.

    Each start is given a little longer, so that the run ends on a machine that has become busier, too.
    """
    kills, said = 0, place.parent / "said.txt"
    while True:
        child = os.fork()
        if child == 0:
            _quiet_run(place, said)
        time.sleep(chance.uniform(0, longest * 1.1**kills))
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return kills
        if code == -signal.SIGKILL:
            kills += 1
        elif _FORKED not in said.read_text():
            raise RuntimeError(f"ended with exit code {code} after {kills} kills: {said.read_text()[-1000:]}")


def _quiet_run(place: Path, said: Path) -> None:
    code = 1
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        train_run(place)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def main() -> int:
    """Kill, compare, count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    options = parser.parse_args()
    spare_pictures()
    chance, place = random.Random(0), Path(tempfile.mkdtemp()) / "run"
    place.mkdir()
    import_module("toolkit.run.job")  # loads the libraries, which the forks then have; nothing is trained before a fork
    _undisturbed(place)  # the first is slower: its files are not in memory yet
    began = time.perf_counter()
    _undisturbed(place)
    expected, longest = run_results(place), 0.9 * (time.perf_counter() - began)
    kills = runs = equal = 0
    while kills < options.kills:
        shutil.rmtree(place)
        place.mkdir()
        kills += kill_at_random(place, longest, chance)
        runs += 1
        found = run_results(place)
        equal += found == expected
        for part in expected:
            if found[part] != expected[part]:
                print(f"  {part}: {found[part]}\n  not {expected[part]}")
        print(f"{kills} kills over {runs} runs, {equal} of {runs} ended as if never killed", flush=True)
    shutil.rmtree(place.parent)
    return int(equal < runs)


def _undisturbed(place: Path) -> None:
    """The run from its beginning to its end, in a fork as well. Raises where it ends with an error."""
    said = place.parent / "said.txt"
    while True:
        shutil.rmtree(place)
        place.mkdir()
        child = os.fork()
        if child == 0:
            _quiet_run(place, said)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        if _FORKED not in said.read_text():
            raise RuntimeError(f"ended with exit code {os.waitstatus_to_exitcode(status)}: {said.read_text()[-1000:]}")


if __name__ == "__main__":
    sys.exit(main())
