"""A machine with a rehearsed card: the library built, and the environment in which a program finds it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

__all__ = ["ENVIRONMENT", "ROOT", "Machine", "Setting", "missing"]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-card"
_PYTHON = ENVIRONMENT / "bin" / "python"
_SOURCES = Path(__file__).parent / "runtime"
_DRIVER = "libcuda.cpp"


@dataclass(frozen=True)
class Setting:
    """What the card is, in bytes where it is about memory, and which faults it has; see runtime/settings.cpp."""

    memory: int = 12 << 30
    context: int = 300 << 20
    other: int = 0
    sm: int = 86
    multiprocessors: int = 28
    name: str = "NVIDIA GeForce RTX 3060"
    devices: int = 1
    driver: int = 13000
    late: int = 1
    largest_copy: int | None = None
    take_after: int | None = None
    take_bytes: int | None = None
    poison_at: int | None = None
    refused_stages: int | None = None
    compile: int | None = None
    races: int | None = None
    sizes: int | None = None
    until: str | None = None
    log: str | None = None

    def variables(self) -> dict[str, str]:
        """As environment variables."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {f"REHEARSED_CARD_{name.upper()}": str(value) for name, value in given.items() if value is not None}


def missing() -> str | None:
    """Why there is no rehearsed card here, None where there is one."""
    if not _PYTHON.exists():
        return "no CUDA build of torch in .venv-card: run bash scripts/test.sh --card"
    return None


def _packages() -> Path:
    return next((ENVIRONMENT / "lib").glob("python3*/site-packages"))


def _build() -> Path:
    """The folder with both libraries, compiled where their sources are new."""
    sources = sorted(_SOURCES.iterdir())
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = ENVIRONMENT / f"rehearsed-card-{digest}"
    if folder.is_dir():
        return folder
    work = Path(tempfile.mkdtemp(dir=ENVIRONMENT))
    flags = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread"]
    include = _packages() / "nvidia" / "cu13" / "include"
    runtime = [str(source) for source in sources if source.suffix == ".cpp" and source.name != _DRIVER]
    card = [*flags, f"-I{include}", *runtime, "-o", str(work / "librehearsed_card.so")]
    driver = [*flags, str(_SOURCES / _DRIVER), "-Wl,-soname,libcuda.so.1", "-o", str(work / "libcuda.so.1")]
    for command in (card, driver):
        subprocess.run(command, check=True)
    try:
        work.rename(folder)
    except OSError:  # another process was first
        assert folder.is_dir()
    return folder


@dataclass(frozen=True)
class Machine:
    """Runs programs on the card. What onecard keeps between runs goes into `folder`."""

    folder: Path
    setting: Setting = Setting()

    @property
    def executable(self) -> str:
        """Python with the CUDA build."""
        return str(_PYTHON)

    def with_card(self, **changes: Any) -> Machine:
        """The same machine with another card."""
        return replace(self, setting=replace(self.setting, **changes))

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Of a process that has the card."""
        libraries = _build()
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "REHEARSED_CARD_"))
        }
        return {
            **kept,
            "LD_PRELOAD": str(libraries / "librehearsed_card.so"),
            "LD_LIBRARY_PATH": str(libraries),
            "PYTHONPATH": str(ROOT),
            "PYTORCH_NVML_BASED_CUDA_CHECK": "0",  # there is no NVML
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "ONECARD_CACHE": str(self.folder / "onecard"),
            "TRITON_CACHE_DIR": str(ENVIRONMENT / "triton"),
            **self.setting.variables(),
            **(more or {}),
        }

    def python(
        self, *arguments: str | Path, more: Mapping[str, str] | None = None, given: str = "", timeout: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments; nothing is raised for its exit code."""
        command = [str(_PYTHON), *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment(more),
            input=given,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def onecard(self, *arguments: str | Path, more: Mapping[str, str] | None = None, **options: Any) -> Outcome:
        """Run a verb."""
        report = Path(tempfile.mkdtemp(dir=self.folder)) / "report.json"
        variables = {"REHEARSED_CARD_REPORT": str(report), **(more or {})}
        done = self.python("-m", "tests.card.command", *arguments, more=variables, **options)
        found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
        return Outcome(done.returncode, done.stdout, done.stderr, found)


@dataclass(frozen=True)
class Outcome:
    """How a verb ended, and what the card counted."""

    code: int
    out: str
    err: str
    report: Mapping[str, Any]

    def require(self) -> Outcome:
        """Itself, where it went well."""
        assert self.code == 0, f"exit code {self.code}\n{self.out[-2000:]}\n{self.err[-4000:]}"
        return self
