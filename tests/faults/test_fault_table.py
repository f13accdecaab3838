"""docs/faults.md says which test holds each fault; a test that is renamed or dropped must not stay in it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`((?:tests/[\w/]+/)?test_\w+\.py)::(test_\w+)`")


def test_every_test_of_the_fault_table_exists() -> None:
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines() if ".py::" in line]
    assert len(rows) >= 50
    for row in rows:
        assert NAMED.search(row), row
        for file, name in NAMED.findall(row):
            path = ROOT / file if "/" in file else ROOT / "tests" / "faults" / file
            assert f"\ndef {name}(" in path.read_text(encoding="utf-8"), f"{file}::{name}"
