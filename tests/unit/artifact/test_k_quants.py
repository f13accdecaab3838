"""K-quants are llama.cpp's own, made of the merge in bf16, compared with it, and whole or not there at all."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.unit.artifact.conftest import BASE
from toolkit.errors import ModelError, RecipeError, ResourceError
from toolkit.export import export_adapter, is_rounded_again, llama_quantize, require_quant
from toolkit.export.llama_quantize import K_QUANTS, quantise, require_space

gguf = pytest.importorskip("gguf")
Write = Callable[..., Path]
TEXTS = [list(range(3, 60)), list(range(90, 120))]
SIDE = Path(llama_quantize.__file__).with_name("quantiser_side.py")


def program(path: Path, *lines: str) -> str:
    """A program of Python, which gets a file, another to write, a type's number, and how many threads."""
    text = [f"#!{sys.executable}", "import os, sys, time", "source, made, number, threads = sys.argv[1:]", *lines]
    path.write_text("\n".join(text) + "\n")
    path.chmod(0o755)
    return str(path)


QUANTISES = """
import gguf
read, kinds = gguf.GGUFReader(source), gguf.GGMLQuantizationType
writer = gguf.GGUFWriter(made, read.fields["general.architecture"].contents())
for key, field in read.fields.items():
    if not key.startswith("GGUF.") and key != "general.architecture":
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1])
for tensor in read.tensors:
    if tensor.tensor_type != kinds.BF16:
        writer.add_tensor(tensor.name, tensor.data)
        continue
    values = gguf.quants.dequantize(tensor.data, kinds.BF16) * FACTOR
    writer.add_tensor(tensor.name, gguf.quants.quantize(values, kinds.Q5_0), raw_dtype=kinds.Q5_0)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
assert number == "15", number
print("[   1/   1] done")
"""


def test_it_is_made_of_the_merge_measured_and_alone_in_its_folder(artifact: Path, tmp_path: Path) -> None:
    stand_in = program(tmp_path / "quantiser", QUANTISES.replace("FACTOR", "1"))
    out = tmp_path / "out"
    made = export_adapter(
        artifact, BASE, "gguf-merged", out, quant="Q4_K_M", texts=TEXTS, llama_quantize=stand_in, force=True
    )
    assert 0 < made.difference <= made.bound
    assert made.stored == {"Q5_0": 29, "F32": 21}
    assert made.fell_back[:2] == ("token_embd.weight as Q5_0 (1)", "blk.*.attn_q.weight as Q5_0 (4)")
    assert made.survival is not None
    assert made.survival.losses is not None
    assert [path.name for path in sorted(out.glob("*.gguf"))] == ["model.gguf"]
    export_adapter(artifact, BASE, "gguf-merged", tmp_path / "floats", quant="bf16")
    before, after = (gguf.GGUFReader(str(folder / "model.gguf")).tensors for folder in (tmp_path / "floats", out))
    for one, other in zip(before, after, strict=True):
        values = gguf.quants.dequantize(one.data, one.tensor_type)
        is_block = other.tensor_type.name == "Q5_0"
        wanted = gguf.quants.quantize(values, other.tensor_type) if is_block else values
        np.testing.assert_array_equal(other.data, wanted, err_msg=one.name)


def test_llama_cpps_own_keeps_routers_and_norms(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cyllama")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    made = export_adapter(artifact, BASE, "gguf-merged", tmp_path / "out", quant="q4_k_m", texts=TEXTS, force=True)
    found = gguf.GGUFReader(str(tmp_path / "out/model.gguf"))
    assert found.fields["general.file_type"].contents() == K_QUANTS["q4_k_m"]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in found.tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name or "ffn_gate_inp" in name} == {"F32"}
    assert kinds["blk.1.ffn_up_exps.weight"] == "Q5_0"  # its rows have 128 values
    assert "blk.*.ffn_up_exps.weight as Q5_0 (4)" in made.fell_back
    assert 0 < made.difference <= made.bound


def test_what_goes_wrong_is_one_line_and_leaves_nothing(artifact: Path, tmp_path: Path) -> None:
    cases = (
        ("exit", ("print('no such architecture')", "sys.exit(3)"), "the quantiser ended with 3: no such architecture"),
        ("twice", (QUANTISES.replace("FACTOR", "2"),), r"what was written is off by \d"),
        ("none", ("open(made, 'wb').write(open(source, 'rb').read()[:-1])",), "runs past the end of the file"),
    )
    for name, lines, why in cases:
        made = program(tmp_path / name, *lines)
        with pytest.raises(ModelError, match=why) as caught:
            export_adapter(artifact, BASE, "gguf-merged", tmp_path / "out", quant="q4_k_m", texts=TEXTS,
                           llama_quantize=made)  # fmt: skip
        assert "\n" not in str(caught.value)
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_other_tensors_than_it_was_given_are_refused(tmp_path: Path) -> None:
    for name, rows in (("floats", 8), ("other", 4)):
        writer = gguf.GGUFWriter(str(tmp_path / f"{name}.gguf"), "qwen3moe")
        writer.add_tensor("token_embd.weight", np.ones((rows, 32), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    copies = program(
        tmp_path / "copies", f"open(made, 'wb').write(open({str(tmp_path / 'other.gguf')!r}, 'rb').read())"
    )
    with pytest.raises(ModelError, match="wrote other tensors than it was given"):
        quantise(tmp_path / "floats.gguf", tmp_path / "made.gguf", "q6_k", copies)


def test_a_quantiser_is_there_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"--quant q5_k_m: made by .* pip install 'onecard\[kquants\]', or name the"):
        require_quant("gguf-merged", "q5_k_m")
    with pytest.raises(RecipeError, match="--llama-quantize here: no program there"):
        require_quant("gguf-merged", "q5_k_m", llama_quantize="here")
    with pytest.raises(RecipeError, match="--llama-quantize: makes K-quants of gguf-merged alone"):
        require_quant("gguf-merged", "q8_0", llama_quantize="here")
    assert is_rounded_again(BASE, "gguf-merged", "Q4_K_M")
    assert is_rounded_again(BASE, "gguf-merged", "Q4_0")
    assert not is_rounded_again(BASE, "gguf-merged", "Q8_0")


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floats = tmp_path / "folder/floats.gguf"
    floats.parent.mkdir()
    with floats.open("wb") as file:
        file.truncate(10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_200_000_000))
    require_space(floats, None)
    require_space(floats, "iq2_m")
    with pytest.raises(ResourceError, match=r"1\.2 GB free, the export needs 1\.25 GB; give a folder on another disk"):
        require_space(floats, "q4_k_m")


def test_it_ends_when_what_started_it_ends(tmp_path: Path) -> None:
    sleeps = program(
        tmp_path / "sleeps", f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))", "time.sleep(60)"
    )
    starts = f"import subprocess, sys; subprocess.run([sys.executable, {str(SIDE)!r}, {sleeps!r}, 'a', 'b', '15', '1'])"
    parent = subprocess.Popen([sys.executable, "-c", starts])
    pid = awaited(tmp_path / "pid")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert ended(pid)


def test_an_interrupt_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    told = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    sleeps = program(tmp_path / "sleeps", told, "print('[   1/   9] a tensor', flush=True)", "time.sleep(60)")
    monkeypatch.setattr(llama_quantize, "advance", interrupted)
    monkeypatch.setattr(llama_quantize, "read_header", lambda path: SimpleNamespace(tensors={}))
    with pytest.raises(KeyboardInterrupt):
        quantise(tmp_path / "floats.gguf", tmp_path / "made.gguf", "q6_k", sleeps)
    assert ended(awaited(tmp_path / "pid"))


def awaited(path: Path) -> int:
    for _ in range(500):
        if path.is_file() and (text := path.read_text()):
            return int(text)
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come")


def ended(pid: int) -> bool:
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
            return True  # nobody has waited for it
        time.sleep(0.02)
    return False
