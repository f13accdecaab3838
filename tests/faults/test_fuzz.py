"""Mutated and hostile input gives an answer or an error of ours, in every reader of what others wrote.

A short run of `scripts/faults/fuzz.py`, hypothesis on the same readers, and the fuzzer itself on readers that fail.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.faults.fuzz import MOST_BYTES, fuzz, mutated
from scripts.faults.mutations import mutate_json
from scripts.faults.targets import TARGETS, Target
from toolkit.errors import DataError, OnecardError

TIMES = {"chat template": 30, "recipe": 60, "quantised formats": 600}
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
        if target.whole:
            target.whole(seed)
    found = fuzz(target, TIMES.get(name, 200))
    assert found.failures == []
    assert 0 < found.refused <= found.inputs == TIMES.get(name, 200)


@pytest.mark.parametrize("name", ["recipe", "jsonl", "adapter config", "artifact manifest", "checkpoint manifest"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
def test_any_json_is_read_or_refused(name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    target = TARGETS[name](tmp_path_factory.mktemp("fuzz"))
    tree = json.loads(target.seeds[0]) if mutate_json in target.mutations else {}
    change = data.draw(
        st.dictionaries(st.sampled_from(sorted(tree)) if tree else st.text(max_size=8), JSON, max_size=3)
    )
    try:
        target.read(json.dumps({**tree, **change}).encode())
    except OnecardError as error:
        assert "\n" not in str(error).strip()


def crash(data: bytes) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(data: bytes) -> None:
    while True:
        pass


def devour(data: bytes) -> None:
    bytearray(2 * MOST_BYTES)


def ramble(data: bytes) -> None:
    raise DataError("one\ntwo")


def trace(data: bytes) -> None:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (crash, "SIGKILL"),
        (hang, "a hang"),
        (devour, "MemoryError"),
        (ramble, "more than one line"),
        (trace, "KeyError"),
    ],
)
def test_the_fuzzer_sees_what_fails(
    fail: Callable[[bytes], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.faults.fuzz.MOST_SECONDS", 0.2)
    target = Target("failing", [b"some words"], lambda data: None)
    bad = mutated(target, 0, 3)

    def read(data: bytes) -> None:
        if data == bad:
            fail(data)

    target.read = read
    found = fuzz(target, 6)
    assert found.inputs == 6
    (failure,) = found.failures
    assert failure.startswith("input 3: ")
    assert words in failure


def test_a_short_cut_that_fails_is_no_failure_where_the_whole_way_refuses() -> None:
    def refuse(data: bytes) -> None:
        raise DataError("too long")

    found = fuzz(Target("short", [b"some words"], crash, whole=refuse), 3)
    assert (found.inputs, found.refused, found.whole, found.failures) == (3, 3, 3, [])
