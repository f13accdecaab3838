"""Quantised MoE checkpoints written by the real packages, as the reference for our readers of their files.

    .venv/bin/python scripts/parity/format_writers.py [PACKAGE …] [--out FOLDER] [--golden]

Makes (once each) an environment of its own for every package, with the versions below, and runs a small program of
`format_sides/` in it. That program writes tiny random checkpoints, FOLDER/PACKAGE/FAMILY-VARIANT, as the package stores
them. Beside each lies `expected.safetensors`: every quantised weight by its plain name, as the package dequantises it;
`expected.json` says in which type it did so. A variant that a package cannot write is told and left out.

`--golden` writes small cases for the tests instead: tests/fixtures/formats/CASE.safetensors, a few modules with all
their parts and the tensors `expected.NAME`, and cases.json, with the config as the package writes it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from second_environment import python_with  # noqa: E402

__all__ = ["PACKAGES", "Side", "main"]

FIXTURES = ROOT / "tests/fixtures/formats"
_TORCH, _TRANSFORMERS = "torch==2.13.0", "transformers==5.23.0"


@dataclass(frozen=True)
class Side:
    """The program of `format_sides/` that writes with a package, and what its environment holds.

    `alone` are installed without what they ask for: they ask for more than their packing needs. Without `golden` there
    are whole checkpoints only.
    """

    program: str
    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    golden: bool = True


PACKAGES = {
    "compressed_tensors": Side(
        "compressed_tensors_side.py", ("compressed-tensors==0.20.1", _TRANSFORMERS, "safetensors==0.8.0")
    ),
    "compressed_tensors_old": Side(
        "compressed_tensors_side.py",
        ("compressed-tensors==0.17.1", _TRANSFORMERS, "safetensors==0.8.0", "psutil==7.2.2"),
    ),
    "llmcompressor": Side(
        "llmcompressor_side.py",
        ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0", "safetensors==0.8.0"),
        golden=False,
    ),
    "bitsandbytes": Side(
        "bitsandbytes_side.py", ("bitsandbytes==0.50.2", _TRANSFORMERS, "accelerate==1.15.0", "safetensors==0.8.0")
    ),
    "gptqmodel": Side(
        "gptqmodel_side.py",
        (
            _TRANSFORMERS,
            *("accelerate==1.15.0", "datasets==5.2.0", "pillow==13.0.0", "protobuf==7.36.2", "requests==2.34.2"),
            *("defuser==0.0.28", "device-smi==0.5.7", "logbar==0.4.15", "pypcre==0.6.4", "tokenicer==0.0.14"),
            *("threadpoolctl==3.8.0", "torchao==0.18.0", "safetensors==0.8.0", "setuptools==84.2.1"),
        ),
        ("GPTQModel==7.7.0", "optimum==2.3.0"),  # the second, for transformers to read such files
    ),
    "mlx": Side("mlx_side.py", ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2", "transformers==5.24.0", "safetensors==0.8.0")),
    "autoawq": Side(
        "autoawq_side.py",
        (
            *("transformers==4.51.3", "accelerate==1.6.0", "datasets==3.6.0", "zstandard==0.25.0", "triton==3.7.1"),
            *("safetensors==0.8.0", "setuptools==84.2.1"),
        ),
        ("autoawq==0.2.9",),
    ),
    "modelopt": Side("modelopt_side.py", ("nvidia-modelopt[hf]==0.47.0", "transformers==5.14.1", "safetensors==0.8.0")),
    "quark": Side(
        "quark_side.py", ("amd-quark==0.13", "transformers==5.24.0", "accelerate==1.15.0", "safetensors==0.8.0")
    ),
    "hqq": Side("hqq_side.py", ("hqq==0.2.8.post1", "transformers==5.24.0", "safetensors==0.8.0")),
    "torchao": Side("torchao_side.py", ("torchao==0.18.0", _TRANSFORMERS, "accelerate==1.15.0", "safetensors==0.8.0")),
    "auto_round": Side("auto_round_side.py", ("auto-round==0.16.1", "transformers==5.24.0", "safetensors==0.8.0")),
    "transformers": Side("transformers_side.py", (_TRANSFORMERS, "safetensors==0.8.0")),
}


def main(arguments: list[str] | None = None) -> int:
    """Write with every package asked for; the exit status is 1 where a package wrote nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", help=f"of {', '.join(PACKAGES)}; all of them when none is given")
    parser.add_argument("--out", type=Path, default=ROOT / "models/formats", help="folder for the whole checkpoints")
    parser.add_argument("--golden", action="store_true", help="write the small cases of the tests instead")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-formats", help="where the environments are")
    options = parser.parse_args(arguments)
    if unknown := set(options.packages) - set(PACKAGES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(PACKAGES)}")
    failed = []
    for name in options.packages or PACKAGES:
        side = PACKAGES[name]
        if options.golden and not side.golden:
            continue
        try:
            python = python_with(options.environments / name, (_TORCH, *side.packages), pins=None, alone=side.alone)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed.append(name)
            continue
        written = _golden(python, side) if options.golden else _whole(python, side, options.out / name)
        print(f"{name}: {written} {'cases' if options.golden else 'checkpoints'}")
        failed += [name] * (not written)
    if failed:
        print(f"nothing written by: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _whole(python: str, side: Side, out: Path) -> int:
    _run(python, side, "whole", out)
    return len(list(out.glob("*/expected.json")))


def _golden(python: str, side: Side) -> int:
    """The cases go into one folder and one index; those of other packages stay as they are."""
    FIXTURES.mkdir(parents=True, exist_ok=True)
    index = FIXTURES / "cases.json"
    known = json.loads(index.read_text()) if index.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        _run(python, side, "golden", Path(scratch))
        found = Path(scratch) / "cases.json"
        cases = json.loads(found.read_text()) if found.is_file() else {}
        for case in cases:
            (FIXTURES / f"{case}.safetensors").write_bytes((Path(scratch) / f"{case}.safetensors").read_bytes())
    if cases:
        lines = [f"{json.dumps(case)}: {json.dumps(told)}" for case, told in sorted({**known, **cases}.items())]
        index.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return len(cases)


def _run(python: str, side: Side, what: str, out: Path) -> None:
    program = Path(__file__).with_name("format_sides") / side.program
    alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [str(Path(python).absolute()), str(program.absolute()), what, str(out.absolute())]
    with tempfile.TemporaryDirectory() as scratch:  # GPTQModel writes a log where it stands
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **alone}, cwd=scratch
        )
    for line in done.stdout.splitlines():
        if line.startswith("left out:"):
            print(line)
    if done.returncode:
        print("\n".join(done.stderr.splitlines()[-8:]), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
