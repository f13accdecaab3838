"""The table of rehearsed loads: what was found before, beside the plans of two stacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MIB = 1 << 20


@pytest.mark.parametrize(("reserved", "code"), [(9000, 0), (9100, 1)])
def test_loads_stand_beside_the_plans_of_both_stacks(reserved: int, code: int, tmp_path: Path) -> None:
    sizes = {"planned": 8600, "planned_attached": 7600, "attached": 7601, "load_peak": 7700, "reserved_peak": reserved}
    found = {
        "code": 0,
        "card": "rtx-3060-12gb",
        "streamed": "0 of 16",
        **{key: mib * MIB for key, mib in sizes.items()},
    }
    (tmp_path / "olmoe-1b-7b.json").write_text(json.dumps(found))
    script = [sys.executable, "scripts/rehearsed_loads.py", "--newest", sys.executable, "--keep", str(tmp_path)]
    done = subprocess.run([*script, "--recipes", "olmoe-1b-7b"], cwd=ROOT, capture_output=True, text=True, check=False)
    cells = done.stdout.splitlines()[-1].split(" | ")
    assert done.returncode == code, done.stderr
    assert cells[:3] == ["| olmoe-1b-7b", "rtx-3060-12gb", "0 of 16"]
    assert cells[3] == cells[4]
    assert cells[5:] == ["7,600", "7,601", "7,700", f"{reserved:,} |"]
