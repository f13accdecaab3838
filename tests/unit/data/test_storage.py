"""Large data sets: what does not fit in memory is kept in a file, and nothing of the result changes."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import pack_dataset

from toolkit.data import build, reading, storage
from toolkit.data.encode import Encoded, EncodedRow, HeldOut, pack_row, unpack_row
from toolkit.data.storage import Spool, View, chosen, count_trained, sequence_lengths
from toolkit.errors import ResourceError
from toolkit.labels import IGNORED


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


MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=12)


def encoded(masks: list[list[bool]]) -> Iterator[Encoded]:
    for number, mask in enumerate(masks):
        ids = np.arange(number, number + len(mask), dtype=np.int32)
        yield Encoded(f"f:{number}", ids, np.asarray(mask, dtype=np.bool_))


def mapped(masks: list[list[bool]]) -> Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_TABLE_IN_MEMORY", 0)
        rows, places = storage.token_table(encoded(masks), 1)
    assert list(places) == [each.place for each in encoded(masks)]
    assert places[1:] == list(places)[1:]
    return rows


@given(MASKS)
def test_rows_lengths_and_labels_are_those_of_the_examples(masks: list[list[bool]]) -> None:
    in_memory, in_a_file = storage.token_table(encoded(masks), 0)[0], mapped(masks)
    assert in_memory._fingerprint == in_a_file._fingerprint
    for rows in (in_memory, in_a_file, in_a_file.select([len(masks) - 1, 0])):
        expected = [len(each) for each in rows["input_ids"]]
        labelled = [sum(label != IGNORED for label in each) for each in rows["labels"]]
        assert sequence_lengths(rows).tolist() == expected
        assert count_trained(rows).tolist() == labelled
    assert in_a_file["labels"][0] == [i if on else IGNORED for i, on in enumerate(masks[0])]
    assert sequence_lengths(in_memory.select([])).tolist() == []


def test_what_is_made_of_a_mapped_table_is_mapped_too() -> None:
    masks = [[True] * (1 + number % 5) for number in range(3000)]
    rows = mapped(masks)
    packed = pack_dataset(rows, 8)
    assert packed[:] == pack_dataset(storage.token_table(encoded(masks), 0)[0], 8)[:]
    assert [Path(each["filename"]).parent for each in packed.cache_files] == [storage.scratch_folder()]
    assert pickle.loads(pickle.dumps(packed))[0] == packed[0]  # noqa: S301 - what this line wrote; for loader workers


def test_a_full_disk_is_one_line_for_the_table_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.tempfile, "mkstemp", lambda **_: (os.open("/dev/null", os.O_RDONLY), "/dev/full"))
    with pytest.raises(ResourceError, match=r"no room for the examples \(.*No space left on device.*\).*TMPDIR"):
        mapped([[True] * 9 for _ in range(100_000)])


def test_a_folder_that_cannot_be_made_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "scratch_parent", lambda: tmp_path / "away")
    with pytest.raises(ResourceError, match="away: no room for the examples"):
        storage._locked_folder.__wrapped__()


WAIT = "import time; from toolkit.data.storage import scratch_folder as f; print(f(), flush=True); time.sleep({})"


def process(parent: Path, seconds: int) -> tuple[subprocess.Popen[str], Path]:
    child = subprocess.Popen(
        [sys.executable, "-c", WAIT.format(seconds)],
        env={**os.environ, "TMPDIR": str(parent), "PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    folder = Path(child.stdout.readline().strip())
    assert folder.parent == parent
    return child, folder


def test_the_folder_goes_with_its_process_and_that_of_a_killed_one_at_the_next_start(tmp_path: Path) -> None:
    killed, left = process(tmp_path, 60)
    (left / "0.arrow").write_text("tokens")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert left.exists()
    living, held = process(tmp_path, 60)
    assert not left.exists()
    ended, own = process(tmp_path, 0)
    ended.communicate()
    assert ended.returncode == 0
    assert (own.exists(), held.exists()) == (False, True)
    living.terminate()
    living.communicate()


def test_tmpdir_is_heeded_and_else_a_folder_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    assert storage.scratch_parent() == (Path("/var/tmp") if os.access("/var/tmp", os.W_OK) else tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert storage.scratch_parent() == tmp_path
