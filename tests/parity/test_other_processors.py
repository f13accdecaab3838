"""What depends on a processor's kernels, run again with those of two others, in a process of its own each.

A row of a product may be rounded otherwise among other rows, and int8 products may saturate: both are the processor's,
and a promise that holds here by chance would break elsewhere. The two that matter beside this machine's own:

- AVX2, nothing wider anywhere: MKL takes six rows at a time, so a row's bits depend on its place and on how many there
  are, and int8 products saturate.
- AVX-512 without units for int8 (VNNI) or AMX: MKL's other kernels, with bits by number of rows and by alignment; int8
  products saturate although the registers are there.

MKL obeys on Intel's processors only and has a third set of kernels for others, so it is told that this is one, by a
preloaded library of two functions. What the libraries then say of themselves is read before anything is run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.harness.faulty import compiler

ROOT = Path(__file__).parents[2]
INTEL = "int mkl_serv_intel_cpu(void) { return 1; }\nint mkl_serv_intel_cpu_true(void) { return 1; }\n"
SAYS = """\
import runpy
import torch
digits = runpy.run_path("toolkit/ops/split_int8.py")
rows = torch.full((64, 64), 127).char()
rows[::3] = -128
product = rows.float() @ rows.float().t()
exact = torch.equal(torch._int_mm(rows, rows.t()).float(), product)
print("torch:", torch.backends.cpu.get_cpu_capability())
print("digits:", "used" if digits["_has_integer_units"]() else "not used", "and", "exact" if exact else "inexact")
"""
TESTS = [
    "tests/parity/test_expert_layer.py::test_a_layer_whose_tokens_share_a_scale_is_found_out",
    "tests/parity/test_expert_layer.py::test_a_token_feels_of_its_neighbours_no_more_than_rounding",
    "tests/parity/test_expert_layer.py::test_bits_do_not_depend_on_the_number_of_threads",
    *(
        f"tests/parity/test_packing.py::{name}[{family}]"
        for name in (
            "test_logits_of_a_document_do_not_change_by_a_bit_when_another_changes",
            "test_with_the_engine_a_neighbour_changes_rounding_alone",
        )
        for family in ("deepseek_v2", "gpt_oss", "qwen3_moe")
    ),
    "tests/unit/ops/test_workers.py",
    "tests/unit/quant/test_digits.py",
]


@dataclass(frozen=True)
class Kernels:
    """Variables that libraries read as they start, and what each of them then says of itself."""

    capability: str
    mkl: str
    onednn: str
    says: tuple[str, ...]

    @property
    def variables(self) -> dict[str, str]:
        return {
            "ATEN_CPU_CAPABILITY": self.capability.lower(),
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
        }


KERNELS = {
    "AVX2": Kernels(
        "AVX2", "AVX2", "AVX2", ("torch: AVX2\n", "(Intel(R) AVX2) enabled processors", "isa:Intel AVX2\n")
    ),
    "AVX-512": Kernels(
        "AVX512",
        "AVX512",
        "AVX512_CORE",
        ("torch: AVX512\n", "(Intel(R) AVX-512) enabled processors", "isa:Intel AVX-512 with AVX512BW"),
    ),
}


def python(arguments: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module", params=KERNELS)
def variables(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which a process computes with the other processor's kernels; skips where it does not."""
    folder = tmp_path_factory.mktemp("intel")
    kernels, source, library = KERNELS[request.param], folder / "intel.c", folder / "intel.so"
    native = torch.backends.cpu.get_cpu_capability()
    has_them = native.startswith("AVX") and (native != "AVX2" or kernels.capability == "AVX2")
    if not torch.backends.mkl.is_available() or not has_them:
        pytest.skip(f"torch computes with {native} here, or without MKL: {kernels.capability} cannot be asked for")
    if (command := compiler()) is None:
        pytest.skip("no C compiler here, and no ziglang package, for the library that MKL is told by")
    source.write_text(INTEL)
    subprocess.run([*command, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    chosen = {**kernels.variables, "LD_PRELOAD": str(library)}
    told = python(["-c", SAYS], {**chosen, "MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"})
    assert told.returncode == 0, told.stderr
    if missing := [words for words in kernels.says if words not in told.stdout]:
        pytest.skip(f"this processor or this build of torch has them not: nothing says {missing[0].strip()!r}")
    assert "digits: used and inexact" not in told.stdout
    return chosen


def test_what_depends_on_kernels_holds_with_those_of_other_processors(variables: dict[str, str]) -> None:
    done = python(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *TESTS], variables)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_no_row_is_promised_its_bits_in_floats(variables: dict[str, str]) -> None:
    """Why the promise is rounding: here bits do depend on how many rows there are, so the tests above see that too."""
    compare = """\
import torch
x, weight = torch.randn(64, 1024), torch.randn(1024, 512)
alone, together = torch.cat([row @ weight for row in x.split(1)]), x @ weight
print(torch.equal(alone, together), bool(torch.allclose(alone, together, atol=1e-3)))
"""
    assert python(["-c", compare], variables).stdout == "False True\n"
