"""A run from data to chat under published templates, stopped on one day and gone on with the day after.

Two templates, one of which prints the date; `scripts/parity/template_runs.py` goes through ten.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.parity.template_days import Days
from scripts.parity.template_masks import trl_families
from scripts.parity.template_runs import NAMES, STEPS, run_family
from tests.harness.faulty import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler here, and no ziglang package, for the clock")


@pytest.fixture(scope="module")
def days() -> Iterator[Days]:
    with Days() as days:
        yield days


@pytest.mark.parametrize(("name", "notes"), [("gptoss", ["prints the date"]), ("glm4moe", [])])
def test_a_run_goes_on_the_day_after_and_asks_as_it_was_trained(
    days: Days, name: str, notes: list[str], tmp_path: Path
) -> None:
    family = next(family for family in trl_families() if family.name == name)
    assert run_family(family, days, tmp_path) == (dict.fromkeys(STEPS, "ok"), notes)


def test_the_script_knows_its_templates() -> None:
    templates = {name.partition("/")[0] for name in NAMES}
    assert templates <= {family.name for family in trl_families()}
    assert len(templates) >= 10
