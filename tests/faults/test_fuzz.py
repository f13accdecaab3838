"""Mutated and hostile input gives an answer or an error of ours, in every reader of what others wrote.

A short run of `scripts/faults/fuzz.py`, and hypothesis on the same readers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.faults.fuzz import TARGETS, fuzz
from toolkit.errors import OnecardError

TIMES = {"chat template": 12, "recipe": 60}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_are_read_or_refused(name: str, tmp_path: Path) -> None:
    target = TARGETS[name](tmp_path)
    for seed in target.seeds:
        target.read(seed)
    found = fuzz(target, TIMES.get(name, 200))
    assert found.failures == []
    assert 0 < found.refused <= found.inputs


@pytest.mark.parametrize("name", ["recipe", "jsonl", "adapter config", "artifact manifest", "checkpoint manifest"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
def test_any_json_is_read_or_refused(name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    target = TARGETS[name](tmp_path_factory.mktemp("fuzz"))
    tree = json.loads(target.seeds[0]) if target.is_json else {}
    change = data.draw(
        st.dictionaries(st.sampled_from(sorted(tree)) if tree else st.text(max_size=8), JSON, max_size=3)
    )
    try:
        target.read(json.dumps({**tree, **change}).encode())
    except OnecardError as error:
        assert "\n" not in str(error).strip()
