"""A kill or a disk error at any change of a file leaves the old state or the new one, and a rerun ends the same.

A sample; `scripts/faults/kill_points.py` strikes at every change.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.faulty import compiler

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler here, and no ziglang package, for the shim")


def measure(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "scripts.faults.kill_points", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found, done.stderr[-2000:]
    return found


def test_kills_and_disk_errors_are_survived_wherever_something_is_written() -> None:
    wanted = ["save and rotate", "package", "package again", "export merged", "quantize", "push"]
    found = measure(*wanted, "--most", "3")
    assert [each["failures"] for each in found if each["failures"]] == []
    expected = {(name, fault) for name in wanted for fault in ("kill", "ENOSPC", "EIO")}
    assert {(each["scenario"], each["fault"]) for each in found} == expected - {("push", "ENOSPC"), ("push", "EIO")}
    assert all(each["struck"] == 3 < each["changes"] for each in found)


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, Any]]:
    """What came of kills in a whole run, and in one that was cut off and goes on."""
    return {each["scenario"]: each for each in measure("run", "resume", "--most", "2", "--fault", "kill")}


def test_a_whole_run_is_survived(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["run"]["failures"] == []
    assert runs["run"]["struck"] == 2


def test_a_resumed_run_is_survived(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["resume"]["failures"] == []
    assert runs["resume"]["struck"] == 2
