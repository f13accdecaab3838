"""The int8 file behind streaming: written once, bound to its weights, whole or not there at all."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.parity.conftest import COMMON
from toolkit.checkpoint.files import cache_root
from toolkit.offload.cache import fingerprint, int8_folder

WRITE = """
import os, signal, sys
from pathlib import Path
from toolkit.errors import OnecardError
from toolkit.offload.cache import int8_folder
from toolkit.quant import save
if sys.argv[3] == "kill":
    save._copy_rest = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
try:
    int8_folder(sys.argv[1], root=Path(sys.argv[2]))
except OnecardError as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred KB of bfloat16 weights."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    config = CONFIG_MAPPING["olmoe"](**{**COMMON, "num_experts": 8, "intermediate_size": 96})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def write(checkpoint: Path, root: Path, how: str, most: int | None = None) -> subprocess.CompletedProcess[str]:
    """Write the file in a process of its own, where no file may grow beyond `most` bytes."""

    def limit() -> None:
        if most is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with EFBIG, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WRITE, str(checkpoint), str(root), how],
        preexec_fn=limit, capture_output=True, text=True, cwd=Path(__file__).parents[3], env=dict(os.environ),
    )  # fmt: skip


def finished(root: Path) -> list[Path]:
    return [path for path in (root / "int8").iterdir() if not path.name.startswith(".")]


def test_it_is_written_once(checkpoint: Path, tmp_path: Path) -> None:
    first = int8_folder(str(checkpoint), root=tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert int8_folder(str(checkpoint), root=tmp_path) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert int8_folder(str(first), root=tmp_path) == first  # int8 already: used in place
    assert finished(tmp_path) == [first]


def test_other_weights_get_another_file(checkpoint: Path) -> None:
    before = fingerprint(checkpoint)
    (weights,) = checkpoint.glob("*.safetensors")
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert fingerprint(checkpoint) != before
    finally:
        weights.write_bytes(whole)
    assert fingerprint(checkpoint) == before
    assert fingerprint(checkpoint, "float32") != before


def test_killed_while_writing_it_leaves_nothing_under_the_name(checkpoint: Path, tmp_path: Path) -> None:
    assert write(checkpoint, tmp_path, "kill").returncode == -signal.SIGKILL
    assert finished(tmp_path) == []
    assert int8_folder(str(checkpoint), root=tmp_path).is_dir()
    assert [path.name for path in (tmp_path / "int8").iterdir()] == [finished(tmp_path)[0].name]


def test_a_full_disk_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    done = write(checkpoint, tmp_path, "go", most=20_000)
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("ResourceError:")
    assert list((tmp_path / "int8").iterdir()) == []


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ONECARD_CACHE", raising=False)
    assert cache_root() == tmp_path / "onecard"
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "here"))
    assert cache_root() == tmp_path / "here"
