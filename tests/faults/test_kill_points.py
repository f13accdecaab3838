"""A kill or a disk error at any change of a file leaves the old state or the new one, and a rerun ends the same.

Every kill in a save and its rotation, and a sample of the rest; `scripts/faults/kill_points.py` does all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.faulty import compiler

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler here, and no ziglang package, for the shim")


def measure(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "scripts.faults.kill_points", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found, done.stderr[-2000:]
    return found


def test_every_kill_in_a_save_and_its_rotation_is_survived() -> None:
    (found,) = measure("save and rotate", "--fault", "kill")
    assert found["failures"] == []
    assert found["struck"] == found["changes"] > 40


def test_kills_and_disk_errors_elsewhere_are_survived() -> None:
    wanted = ["save and rotate", "package", "package again", "quantize", "push"]
    found = measure(*wanted, "--most", "6")
    assert [each["failures"] for each in found if each["failures"]] == []
    assert {(each["scenario"], each["fault"]) for each in found} >= {(w, "kill") for w in wanted} | {
        (w, f) for w in wanted[:-1] for f in ("ENOSPC", "EIO")
    }


def test_a_whole_run_is_survived() -> None:
    found = measure("run", "--most", "2", "--fault", "kill")
    assert found[0]["failures"] == []
    assert found[0]["struck"] == 2
