"""`scripts/gpu_check.py` and the table of compiled kernels, as far as they go without a card."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "scripts" / "gpu_check.py"
ALONE = f"""
import runpy, sys
for name in ("transformers", "peft", "trl", "accelerate", "datasets", "pydantic", "bitsandbytes", "numpy.testing"):
    sys.modules[name] = None
sys.argv = ["gpu_check.py", *sys.argv[1:]]
runpy.run_path({str(CHECK)!r}, run_name="__main__")
"""


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script where torch and triton are all there is, and no card."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    command = [sys.executable, "-c", ALONE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)


def test_with_torch_and_triton_alone_it_checks_parity(tmp_path: Path) -> None:
    done = alone("--interpret", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "figures.json").read_text()) == {"parity": True}
    *lines, last = done.stdout.splitlines()
    assert len(lines) >= 14
    assert sum("four_bits='int4'" in line for line in lines) == 3  # fp32, sixteen bits, two digits
    assert all(line.startswith("parity ok") for line in lines)
    assert last == "parity holds"


def test_without_a_card_it_says_so_in_one_line() -> None:
    done = alone()
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == "gpu_check.py: no CUDA card here; run it on one, or with --interpret on the CPU\n"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_wrong_numbers_fail(
    script: ModuleType, wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = script.dense_layer
    monkeypatch.setattr(script, "our_layer", lambda leaves, index, weights, _: right(leaves, index, weights) * wrong)
    monkeypatch.setattr(script, "SMALL", script.SMALL[:1])
    monkeypatch.setattr(script, "FOUR_BITS", [])
    assert script.main(["--interpret"]) == 1
    out = capsys.readouterr().out
    assert "parity FAIL torch.float32" in out
    assert out.splitlines()[-1].startswith("parity FAILS")


def test_what_it_times_as_stock_computes_the_same_layer(script: ModuleType) -> None:
    weights, leaves, index = script.build(script.Case(9, 2, 4, 16, 8, 4), "cpu", torch.float32)
    up, down = weights.up.dense(torch.float32), weights.down.dense(torch.float32)
    wanted = script.dense_layer(leaves, index, weights)
    for multiply in (script.loop, script.grouped):
        torch.testing.assert_close(script.stock_layer(leaves, index, up, down, multiply, True), wanted)


def test_kernels_compile_for_cards_that_are_not_here(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "benchmarks" / "triton_kernels.py"), "--json"]
    kernels = ("grouped_gemm", "four_bit_forward", "four_bit_gradient", "split_rows")
    command += ["--kernel", *kernels, "--capability", "89", "120"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    compiled = figures["compiled"]
    assert {(entry["kernel"], entry["capability"]) for entry in compiled} == {
        (kernel, capability) for kernel in kernels for capability in (89, 120)
    }
    for entry in compiled:
        assert entry["fits"]
        assert entry["registers"] is None or 0 < entry["registers"] <= 255
        assert not entry["spilled_bytes"]
    # OLMoE's frozen products by hand: two there, one again and two back, of S·H·2I and S·I·H, 2 operations each.
    frozen = sum(work["frozen_flops"] for work in figures["work"]["OLMoE-1B-7B"])
    S, H, I = 2048 * 8, 2048, 1024  # noqa: E741
    assert frozen == 2 * S * H * I * (3 * 2 + 2 * 1)
    for bound in figures["limits"]:
        assert 0 < bound["forward_w8a8_ms"] <= bound["forward_ms"] < bound["backward_ms"]
