"""Tables of tokens, in memory or in a file, and the folder for such files: the same rows, and nothing left behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import pack_dataset

from toolkit.data import storage
from toolkit.data.encode import Encoded
from toolkit.data.storage import count_trained, sequence_lengths
from toolkit.errors import ResourceError
from toolkit.labels import IGNORED

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


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
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
