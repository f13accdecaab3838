"""Compressed rows: read as their text is, line by line, and refused in one line where they are damaged."""

from __future__ import annotations

import bz2
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from toolkit.data import build_batches
from toolkit.data.files import read_rows
from toolkit.data.sources import looks_local, open_source
from toolkit.errors import DataError

PAIR = {"prompt": "a ", "completion": "b"}
LINES = "".join(f"{json.dumps({**PAIR, 'n': n, 'null': None})}\n" for n in range(400))


def zstd(raw: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(raw, asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress}
KINDS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": json.dumps([PAIR, PAIR], indent=1),
    ".csv": 'prompt,completion\n"two\nlines, ",b\na\tb,c\n',
    ".tsv": 'prompt\tcompletion\n"two\nlines\t"\tb\na,b\tc\n',
}


@pytest.mark.parametrize("end", COMPRESS)
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_rows_are_those_of_the_text(kind: str, end: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / f"rows{kind}", tmp_path / f"packed{kind}{end}"
    raw = ("\ufeff" + KINDS[kind]).encode()
    plain.write_bytes(raw)
    half = len(raw) // 2
    packed.write_bytes(COMPRESS[end](raw[:half]) + COMPRESS[end](raw[half:]))  # as pigz and cat make them
    there, here = ([*read_rows(path)] for path in (plain, packed))
    assert [row.values for row in here] == [row.values for row in there]
    assert [row.place for row in here] == [row.place.replace(str(plain), str(packed)) for row in there]
    assert len(here) > 1


def test_tabs_part_the_fields_of_tsv(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text(KINDS[".tsv"])
    first, second = read_rows(path)
    assert first.values == {"prompt": "two\nlines\t", "completion": "b"}
    assert (second.values, second.place) == ({"prompt": "a,b", "completion": "c"}, f"{path}:4")


@pytest.mark.parametrize("end", COMPRESS)
def test_a_bad_line_has_its_number(end: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / f"rows.jsonl{end}"
    path.write_bytes(COMPRESS[end](f"{LINES}{{\n{LINES}".encode()))
    with pytest.raises(DataError, match=rf"rows\.jsonl\{end}:401: not JSON") as error:
        build_batches(tokenizer, train=str(path))
    assert error.value.exit_code == 3


@pytest.mark.parametrize("on_invalid", ["error", "drop"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
@pytest.mark.parametrize("end", COMPRESS)
def test_a_damaged_archive_is_one_line(kind: str, end: str, on_invalid: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / f"rows{kind}{end}"
    whole = COMPRESS[end](KINDS[kind].encode())
    for broken in (whole[:-3], whole[:9], whole + b"and more", KINDS[kind].encode()):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"cannot be read \(.*\); it is damaged or cut off") as error:
            build_batches(tokenizer, train=str(path), on_invalid=on_invalid)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
    path.write_bytes(COMPRESS[end](b""))
    with pytest.raises(DataError, match="empty; a data file holds at least one row"):
        build_batches(tokenizer, train=str(path), on_invalid=on_invalid)


@pytest.mark.parametrize("end", [".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_hides_the_compression_is_told(kind: str, end: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind}"
    path.write_bytes(COMPRESS[end](KINDS[kind].encode()))
    with pytest.raises(DataError, match=rf"compressed, .*rename it to rows\{kind}\{end}$"):
        list(read_rows(path))


def test_folders_have_compressed_files_in_their_splits(tmp_path: Path) -> None:
    row = json.dumps(PAIR).encode()
    for name, end in (("a.train.jsonl", ".gz"), ("b.train.jsonl", ".zst"), ("val.csv", ".gz")):
        (tmp_path / f"{name}{end}").write_bytes(COMPRESS[end](row if "json" in name else b"text\na\n"))

    def names(split: str | None = None) -> list[str]:
        rows = open_source(".", split=split, base_folder=tmp_path)
        return [Path(row.place.rpartition(":")[0]).name for row in rows]

    assert names() == ["a.train.jsonl.gz", "b.train.jsonl.zst"]
    assert names("validation") == ["val.csv.gz"]
    (tmp_path / "c.jsonl.xz").write_bytes(b"")
    with pytest.raises(DataError, match=r"c\.jsonl\.xz: \.xz: not a format read here"):
        names()
    (tmp_path / "c.jsonl.xz").unlink()
    (tmp_path / "a.train.jsonl").write_bytes(row)
    with pytest.raises(DataError, match=r"a\.train\.jsonl\.gz: the same file lies beside it unpacked"):
        names()


def test_lines_are_unpacked_as_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    line = json.dumps({"text": "word " * 2000}).encode() + b"\n"
    path.write_bytes(gzip.compress(line * 3000))  # 30 MB of text
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 3000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5 << 20


@pytest.mark.parametrize("name", ["data/train.tsv", "data/train.jsonl.zst", "data/rows.arrow"])
def test_a_file_of_the_users_is_no_data_set_on_the_hub(name: str) -> None:
    assert looks_local(name)
