"""Large data sets: what does not fit in memory is kept in a file, and nothing of the result changes."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.data import build, reading, storage
from toolkit.data.encode import Encoded, EncodedRow, HeldOut, pack_row, unpack_row
from toolkit.data.storage import Spool, View, chosen
from toolkit.errors import ResourceError


@given(st.lists(st.integers() | st.text(), max_size=30), st.integers(0, 10), st.integers(1, 40))
def test_a_spool_is_a_list(items: list[Any], in_memory: int, buffer: int) -> None:
    kept = Spool[Any](lambda item: 1, in_memory=in_memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_BUFFER", buffer)
        for number, item in enumerate(items):
            kept.append(item)
            assert kept[number // 2] == items[number // 2]
            assert kept[-1] == item
    assert (len(kept), list(kept), kept[1:-1]) == (len(items), items, items[1:-1])
    with pytest.raises(IndexError):
        kept[len(items)]
    odd = [bool(number % 2) for number in range(len(items))]
    assert list(chosen(kept, odd)) == items[1::2] == chosen(items, odd)


def test_a_view_counts_from_both_ends() -> None:
    seen = View([10, 20, 30, 40], [3, 0, 0])
    assert (seen[0], seen[-1], seen[1:], list(seen), len(seen)) == (40, 10, [10, 10], [40, 10, 10], 3)


def test_rows_come_back_as_they_went() -> None:
    ids, trained = np.arange(5, dtype=np.int32), np.asarray([False, True, True, False, True])
    held = HeldOut("f:1", (1, 2), "q", "a")
    row = EncodedRow((Encoded("f:1", ids, trained, held), Encoded("f:1", ids[:2], trained[:2])), 2, 1, 1, ("<e>",))
    kept = Spool[EncodedRow](lambda row: 1, in_memory=0, pack=pack_row, unpack=unpack_row)
    kept.append(row)
    back = kept[0]
    assert (back.turns, back.thoughts, back.dropped_thoughts, back.enders) == (2, 1, 1, ("<e>",))
    for one, other in zip(back.examples, row.examples, strict=True):
        assert (one.place, one.held_out) == (other.place, other.held_out)
        assert one.ids.dtype == np.int32
        assert (one.ids == other.ids).all()
        assert (one.trained == other.trained).all()


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Spool[str](len, in_memory=0)
    kept.append("x")
    descriptor = os.open("/dev/full", os.O_RDWR)
    monkeypatch.setattr(
        storage.tempfile, "TemporaryFile", lambda buffering, **_: os.fdopen(descriptor, "r+b", buffering)
    )
    with pytest.raises(ResourceError, match=r"no room for the examples \(No space left on device\).*TMPDIR"):
        kept[0]


CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"q{i % 17}"},
            {"role": "assistant", "content": f"a{i % 19}"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "b"},
        ],
        "session": i % 11,
    }
    for i in range(60)
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"shuffle": True},
    {"shuffle": True, "max_samples": 9},
    {"max_samples": 9},
    {"validation_size": 0.3, "group_by": "session"},
    {"dedupe": True, "validation_size": 5},
    {"max_length": 24, "truncation": "keep_start"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_file_changes_nothing(options: dict[str, Any], build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_alike(monkeypatch, lambda: build(CHAT, **options))


def test_a_file_changes_nothing_in_a_mixture(write: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [
        {"path": str(write(CHAT[:40], "a.jsonl")), "weight": 1.5},
        {"path": str(write(CHAT[40:], "b.jsonl")), "weight": 0.5, "max_samples": 15},
    ]
    for options in ({"shuffle": False}, {"validation_size": 0.2}, {"max_samples": 20}):
        assert_alike(monkeypatch, functools.partial(build.build_batches, tokenizer, train=sets, **options))


def assert_alike(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    in_memory = make()
    for module in (reading, build):
        monkeypatch.setattr(module, "Spool", _Stored)
    monkeypatch.setattr(storage, "_TABLE_IN_MEMORY", 0)
    stored = make()
    monkeypatch.undo()
    assert _Stored.reads > 0
    assert not in_memory.train.cache_files
    assert stored.train.cache_files
    assert in_memory.train[:] == stored.train[:]
    assert in_memory.places == stored.places
    assert list(in_memory.held_out) == list(stored.held_out)
    assert in_memory.report == stored.report
    assert in_memory.train._fingerprint == stored.train._fingerprint
    if in_memory.validation is not None:
        assert in_memory.validation[:] == stored.validation[:]


class _Stored(Spool[Any]):
    """A spool that keeps nothing in memory."""

    reads = 0

    def __init__(self, size: Any, **options: Any) -> None:
        super().__init__(size, in_memory=0, **options)

    def __getitem__(self, index: Any) -> Any:
        _Stored.reads += 1
        return super().__getitem__(index)
