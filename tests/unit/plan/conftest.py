"""The tiny checkpoints of the parity tests, their configs alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from tests.parity.conftest import COMMON, FAMILIES


@pytest.fixture(params=FAMILIES)
def family_skeleton(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a config and no weights."""
    CONFIG_MAPPING[request.param](**{**COMMON, **FAMILIES[request.param]}, architectures=["any"]).save_pretrained(
        tmp_path
    )
    return tmp_path
