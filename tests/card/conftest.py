"""The rehearsed card's tests start programs in .venv-card; they are skipped where that is not there, or not meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.card.machine import ROOT, Machine, Outcome, missing

NANO = (
    "training.max_steps=3", "training.logging_steps=1", "data.max_samples=200", "eval.max_samples=4",
    "eval.max_new_tokens=4",
)  # fmt: skip
"""Overrides of the quickstart, so that a run takes seconds."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_asked_for = any("tests/card" in str(argument) for argument in config.args)
    if reason := missing() if is_asked_for else "asked for by bash scripts/test.sh --card":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """With a card of 12 GiB."""
    return Machine(tmp_path_factory.mktemp("machine"))


@pytest.fixture
def train(machine: Machine, tmp_path: Path) -> Callable[..., tuple[Outcome, Path]]:
    """Train the quickstart's model for a few steps, in a folder of the test's own."""

    def run(name: str, *overrides: str, on: Machine | None = None, recipe: str = "quickstart") -> tuple[Outcome, Path]:
        folder = tmp_path / name
        given = (f"training.output_dir={folder}", *NANO, *overrides)
        return (on or machine).onecard("train", ROOT / "recipes" / f"{recipe}.yaml", *given), folder

    return run
