"""The header of a GGUF file is walked inside its own bytes; splits are put together; what is wrong is one line."""

from __future__ import annotations

import math
import re
import shutil
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toolkit.checkpoint.formats.gguf_file import GgufFile, Strings, open_gguf
from toolkit.errors import ModelError, RecipeError

gguf = pytest.importorskip("gguf")

NUMBERS = np.arange(96, dtype=np.float32).reshape(3, 32)


def header(entries: bytes = b"", tensors: bytes = b"", *, count: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, keys) + entries + tensors


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


ENDLESS = 2**62
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "another file": (b"PK\3\4" + bytes(60), "not a GGUF file"),
    "a length cut off": (b"GGUF\3\0", "header runs past the end of the file"),
    "an old version": (header(version=1), "version 1, this reads 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless keys": (header(keys=ENDLESS) + bytes(64), "a metadata key is no name"),
    "endless tensors": (header(count=ENDLESS) + bytes(64), "a tensor's name is no name"),
    "an endless key": (header(struct.pack("<Q", ENDLESS), keys=1), "header runs past"),
    "an endless text": (header(entry(b"a", 8, struct.pack("<Q", ENDLESS)), keys=1), "header runs past"),
    "endless numbers": (header(entry(b"a", 9, array(4, ENDLESS)), keys=1) + bytes(64), "header runs past"),
    "more bytes than 64 bits count": (header(entry(b"a", 9, array(10, 2**61)), keys=1) + bytes(64), "header runs past"),
    "endless texts": (header(entry(b"a", 9, array(8, ENDLESS)), keys=1) + bytes(64), "header runs past"),
    "arrays in arrays": (header(entry(b"a", 9, array(9, 1, array(9, 1) * 99)), keys=1), "a is an array of the unknown"),
    "an unknown kind": (header(entry(b"a", 13, b""), keys=1), "a has the unknown type 13"),
    "a key twice": (header(entry(b"a", 0, b"\0") * 2, keys=2), "a metadata key is there twice: a"),
    "a key that is no text": (header(entry(b"\xff\xfe", 0, b"\0"), keys=1), "a metadata key is no name"),
    "a key of two lines": (header(entry(b"a\nb", 0, b"\0"), keys=1), "a metadata key is no name"),
    "a tensor twice": (header(tensors=tensor(b"a", (1,)) * 2, count=2), "a tensor's name is there twice: a"),
    "no dimension": (header(tensors=tensor(b"a", ()), count=1), "a has 0 dimensions"),
    "five dimensions": (header(tensors=tensor(b"a", (1,) * 5), count=1), "a has 5 dimensions"),
    "endless dimensions": (header(tensors=text(b"a") + struct.pack("<I", 2**32 - 1), count=1), "4294967295 dimensions"),
    "an empty dimension": (header(tensors=tensor(b"a", (0, 4)), count=1), "a cannot have the shape 4×0"),
    "a product past 64 bits": (header(tensors=tensor(b"a", (2**32, 2**33)), count=1), "a cannot have the shape"),
    "an unknown block type": (header(tensors=tensor(b"a", (32,), 5), count=1), "a has the unknown type 5"),
    "a row that ends within a block": (header(tensors=tensor(b"a", (33,), 8), count=1), "cannot have the shape 33"),
    "a tensor past the end": (header(tensors=tensor(b"a", (64,)), count=1) + bytes(64), "a runs past the end"),
    "an offset past the end": (header(tensors=tensor(b"a", (1,), 0, 2**63), count=1), "a runs past the end"),
    "a tensor over another": (
        header(tensors=tensor(b"a", (16,)) + tensor(b"b", (16,), 0, 32), count=2) + bytes(256),
        "b does not begin where it may",
    ),
    "a tensor beside its place": (header(tensors=tensor(b"a", (1,), 0, 4), count=1) + bytes(64), "a does not begin"),
    "no alignment": (header(entry(b"general.alignment", 4, bytes(4)), keys=1), "general.alignment is 0, and no power"),
    "an odd alignment": (
        header(entry(b"general.alignment", 4, struct.pack("<I", 24)), keys=1),
        "general.alignment is 24, and no power",
    ),
    "an alignment in words": (
        header(entry(b"general.alignment", 8, text(b"x")), keys=1),
        "general.alignment is x, and",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_one_line_and_takes_no_memory(case: str, tmp_path: Path) -> None:
    data, words = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ModelError, match=re.escape(words)) as caught:
        open_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_header_longer_than_any_real_one_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header(entry(b"a", 8, struct.pack("<Q", 2**28)), keys=1))
    with path.open("r+b") as file:
        file.truncate(2**29)
    with pytest.raises(ModelError, match="its header runs past 128 MiB"):
        open_gguf(path)


def written(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, Any] | None = None, **splits: Any) -> Path:
    writer = gguf.GGUFWriter(str(path), "qwen3moe", **splits)
    for key, value in (metadata or {}).items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_key_value(key, *value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_of_every_type_is_read(tmp_path: Path) -> None:
    types = gguf.GGUFValueType
    values: dict[str, Any] = {
        "u8": (200, types.UINT8), "i8": (-3, types.INT8), "u16": (60000, types.UINT16), "i16": (-300, types.INT16),
        "u32": (2**32 - 1, types.UINT32), "i32": (-(2**31), types.INT32), "u64": (2**64 - 1, types.UINT64),
        "i64": (-(2**63), types.INT64), "f64": (0.1, types.FLOAT64), "yes": (True, types.BOOL),
        "f32": (1e-6, types.FLOAT32), "text": ("naïve", types.STRING),
    }  # fmt: skip
    arrays: dict[str, Any] = {
        "numbers": [1, 2, 3],
        "floats": [0.5, 0.25],
        "bools": [True, False],
        "texts": ["a", "", "ü"],
    }
    found = open_gguf(written(tmp_path / "model.gguf", {"a": NUMBERS}, {**values, **arrays})).metadata
    assert {key: found[key] for key in values} == {key: value for key, (value, _) in values.items()}
    assert {key: list(found[key]) for key in arrays} == arrays
    texts = found["texts"]
    assert isinstance(texts, Strings)
    assert (texts[-1], texts[:2], len(texts)) == ("ü", ["a", ""], 3)
    with pytest.raises(IndexError):
        texts[3]


def test_tensors_have_their_shapes_and_are_mapped(tmp_path: Path) -> None:
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "qwen3moe")
    for kind in (kinds.F32, kinds.F16, kinds.BF16, kinds.Q8_0):
        writer.add_tensor(kind.name, gguf.quants.quantize(NUMBERS, kind), raw_dtype=kind)
    writer.add_tensor("stack", np.stack([NUMBERS] * 2))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "model.gguf")
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
        **dict.fromkeys(("F32", "F16", "BF16", "Q8_0"), (3, 32)),
        "stack": (2, 3, 32),
    }
    for name, dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        assert file.slice(name)[...].dtype == dtype
        assert torch.equal(file.slice(name)[1:].float(), torch.from_numpy(NUMBERS[1:]))
    blocks = file.slice("Q8_0")
    assert (blocks.get_shape(), blocks.get_dtype(), blocks[...].dtype) == ([3, 34], "Q8_0", torch.uint8)
    stack = file.tensors["stack"]
    mapped = torch.frombuffer(file.mapped(tmp_path / "model.gguf"), dtype=torch.uint8)
    assert file.slice("stack")[1:].data_ptr() == mapped.data_ptr() + stack.offset + stack.bytes // 2


def test_a_tensor_that_is_changed_leaves_the_others_and_the_file_as_they_are(tmp_path: Path) -> None:
    """Autograd takes what shares storage for changed, too."""
    path = written(tmp_path / "model.gguf", {"a": NUMBERS, "b": NUMBERS})
    before, file = path.read_bytes(), open_gguf(path)
    first, second = file.slice("a")[...], file.slice("b")[...]
    first.add_(1)
    assert (first._version, second._version) == (1, 0)
    assert torch.equal(second, torch.from_numpy(NUMBERS))
    assert path.read_bytes() == before


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    tensors = {f"blk.{number}.attn_norm.weight": NUMBERS + number for number in range(5)}
    written(tmp_path / "model.gguf", tensors, split_max_tensors=2)
    return sorted(tmp_path.glob("*.gguf"))


def test_a_split_file_is_one_model_whichever_part_is_named(split: list[Path]) -> None:
    assert [path.name for path in split] == [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for path in (*split, split[0].parent):
        file = open_gguf(path)
        assert list(file.files) == split
        assert file.metadata["general.architecture"] == "qwen3moe"
        for number in range(5):
            numbers = file.slice(f"blk.{number}.attn_norm.weight")[...]
            assert torch.equal(numbers, torch.from_numpy(NUMBERS + number))


def test_parts_that_are_missing_or_strange_are_named(split: list[Path], tmp_path: Path) -> None:
    first, second, third = split
    kept = third.read_bytes()
    third.unlink()
    with pytest.raises(
        ModelError, match=r"model-00003-of-00003\.gguf: missing, of 3 parts; put all parts into one folder"
    ):
        open_gguf(first)
    shutil.copy(second, third)
    with pytest.raises(ModelError, match="does not say that it is part 3 of 3"):
        open_gguf(first)
    third.write_bytes(kept)
    third.rename(tmp_path / "other.gguf")
    with pytest.raises(ModelError, match="one of 3 parts, but not named"):
        open_gguf(tmp_path / "other.gguf")


def test_a_tensor_in_two_parts_or_in_none_is_refused(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType

    def parts(count: int, names: tuple[str, ...]) -> Path:
        for number, name in enumerate(names):
            facts = {"split.no": (number, kinds.UINT16), "split.count": (2, kinds.UINT16)}
            facts["split.tensors.count"] = (count, kinds.INT32)
            written(tmp_path / f"m-0000{number + 1}-of-00002.gguf", {name: NUMBERS}, facts)
        return tmp_path / "m-00001-of-00002.gguf"

    assert set(open_gguf(parts(2, ("a", "b"))).tensors) == {"a", "b"}
    with pytest.raises(ModelError, match="a is in an earlier part as well"):
        open_gguf(parts(2, ("a", "a")))
    with pytest.raises(ModelError, match="its 2 parts hold 2 tensors of 3"):
        open_gguf(parts(3, ("a", "b")))


def test_a_folder_with_more_than_one_model_asks_for_a_name(tmp_path: Path) -> None:
    written(tmp_path / "a.gguf", {"a": NUMBERS})
    written(tmp_path / "mmproj-a.gguf", {"a": NUMBERS})
    assert open_gguf(tmp_path).files == (tmp_path / "a.gguf",)
    written(tmp_path / "b.gguf", {"a": NUMBERS})
    with pytest.raises(ModelError, match=r"2 GGUF models there \(a\.gguf, b\.gguf\); name one file"):
        open_gguf(tmp_path)
    with pytest.raises(ModelError, match="No such file"):
        open_gguf(tmp_path / "c.gguf")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "model.gguf", {"a": NUMBERS})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RecipeError, match=r"pip install 'onecard\[gguf\]'"):
        open_gguf(path)


def test_a_file_that_got_shorter_is_one_line(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", {"a": NUMBERS})
    file: GgufFile = open_gguf(path)
    size = math.prod(NUMBERS.shape) * 4
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - size)
    with pytest.raises(ModelError, match="cannot be read any more") as caught:
        file.slice("a")[...]
    assert "\n" not in str(caught.value)
