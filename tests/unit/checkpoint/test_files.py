"""A header is read in one place, says where every byte lies, and is refused where safetensors would refuse it."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tests.parity.conftest import EMBEDDED
from toolkit.checkpoint.files import (
    INDEX,
    headers_in,
    listed,
    raw_header,
    read_header,
    shards_of,
    whole_snapshot,
    write_index,
)
from toolkit.errors import ModelError

TOOLKIT = Path(__file__).parents[3] / "toolkit"
BYTE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


def test_every_tensor_lies_where_its_header_says(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(12, dtype=torch.int32).reshape(3, 4),
        "none": torch.empty(0, 5),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "z": torch.randn(2, 3, 5).half(),
    }
    save_file({key: tensors[key] for key in ("a", "none")}, tmp_path / "1.safetensors", metadata={"format": "pt"})
    save_file({key: tensors[key] for key in ("scalar", "z")}, tmp_path / "2.safetensors")
    found = headers_in(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].name, found[name].shape, found[name].bytes) == (name, tuple(tensor.shape), tensor.nbytes)
        with found[name].path.open("rb") as file:
            file.seek(found[name].offset)
            assert file.read(found[name].bytes) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert {name: entry.dtype for name, entry in found.items()} == {
        "a": "I32",
        "none": "F32",
        "scalar": "BF16",
        "z": "F16",
    }


def _written(folder: Path, header: bytes, data: bytes = b"\0") -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


STRANGE = {
    "no JSON": b"\xff" * 8,
    "nothing": b"",
    "a list": b"[]",
    "brackets without end": b"[" * 100_000,
    "an endless number": json.dumps({"x": {**BYTE, "shape": [float("inf")]}}).replace("Infinity", "1e999").encode(),
    "a number that is a truth": json.dumps({"x": {**BYTE, "shape": [True]}}).encode(),
    "less than nothing": json.dumps({"x": {**BYTE, "shape": [-1, -1]}}).encode(),
    "an unknown dtype": json.dumps({"x": {**BYTE, "dtype": "U9"}}).encode(),
    "a shape of other bytes": json.dumps({"x": {**BYTE, "shape": [2]}}).encode(),
    "two on the same bytes": json.dumps({"x": BYTE, "y": BYTE}).encode(),
    "one without a place": b'{"x": {"dtype": "U8", "shape": [1]}}',
    "metadata that is no text": json.dumps({"__metadata__": {"a": 1}, "x": BYTE}).encode(),
}


@pytest.mark.parametrize("header", STRANGE.values(), ids=STRANGE)
def test_what_safetensors_refuses_is_refused(header: bytes, tmp_path: Path) -> None:
    path = _written(tmp_path, header)
    with pytest.raises(SafetensorError), safe_open(path, framework="np"):
        pass
    with pytest.raises(ModelError, match=r"x\.safetensors: .*; copy it again$") as caught:
        read_header(path, "copy it again")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_short_is_told_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"damaged, {whole - 1} bytes where its header says {whole}; download"):
        read_header(path)


def test_a_header_has_a_largest_size(tmp_path: Path) -> None:
    path = _written(tmp_path, json.dumps({"x": BYTE}).encode().ljust(1000))
    assert list(read_header(path, most=1000)) == ["x"]
    assert len(raw_header(path, 10)) == 10
    with pytest.raises(ModelError, match="longer than 999 bytes"):
        read_header(path, most=999)


def test_the_index_says_which_files_there_are(tmp_path: Path) -> None:
    assert listed(tmp_path) == ["model.safetensors"]
    write_index(tmp_path, {"y": "2.safetensors", "x": "1.safetensors", "z": "2.safetensors"}, 3)
    assert listed(tmp_path) == ["1.safetensors", "2.safetensors"]
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(ModelError, match=r"a/b: lacks the weights file 2\.safetensors \(1 missing\)"):
        shards_of(tmp_path, "a/b")
    (tmp_path / "2.safetensors").touch()
    assert shards_of(tmp_path) == listed(tmp_path)
    assert json.loads((tmp_path / INDEX).read_bytes())["metadata"] == {"total_size": 3}


def reads_by_itself(source: str) -> set[str]:
    """Signs that a module reads a header or an index by its own code."""
    signs = {"data_offsets", "weight_map", "__metadata__", "model.safetensors.index.json", "get_shape", "from_bytes"}
    return signs & set(_words(source))


def _words(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text)):
                yield text
            case ast.Attribute(attr=text):
                yield text


def test_only_this_room_reads_headers_and_indexes() -> None:
    assert reads_by_itself("json.load(f)['weight_map']") == {"weight_map"}
    assert reads_by_itself("safe_open(p).get_slice(k).get_shape()") == {"get_shape"}
    outside = [path for path in TOOLKIT.rglob("*.py") if path.relative_to(TOOLKIT).parts[0] != "checkpoint"]
    found = {path.name: signs for path in outside if (signs := reads_by_itself(path.read_text()))}
    assert found == {}


PLACES = ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME")


@pytest.mark.parametrize("place", PLACES)
def test_the_hubs_cache_is_found_wherever_it_is(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PLACES, "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(place, str(tmp_path))
    asks = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", asks], env=os.environ, capture_output=True, text=True, check=True)
    cached = Path(theirs.stdout.strip()) / "models--a--b"
    assert tmp_path in (cached.parent, *cached.parents)
    assert whole_snapshot("a/b") is None
    snapshot = cached / "snapshots" / "0123"
    shutil.copytree(EMBEDDED, snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    assert whole_snapshot("a/b") == whole_snapshot("a/b", "0123") == snapshot
    (shard,) = snapshot.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert whole_snapshot("a/b") is None
