"""A second virtual environment with the pinned versions, for what must run where onecard is not installed.

Comparisons with stock software are only fair on a stock installation. pip's own configuration holds;
ONECARD_TORCH_INDEX names an index to take torch from, as in setup.sh.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["STAMP", "fingerprint", "python_with"]

PINS = Path(__file__).resolve().parents[1] / "constraints.txt"
STAMP = "complete"


def python_with(folder: Path, packages: tuple[str, ...]) -> str:
    """The Python of the environment in `folder`, made anew where it is missing, incomplete or of other versions.

    torch comes first, so that no other package's requirement chooses another build of it.

    Raises:
        RuntimeError: pip failed; its last line.
    """
    python, stamp = folder / "bin" / "python", folder / STAMP
    if not stamp.is_file() or stamp.read_text() != fingerprint(packages):
        print(f"making {folder} with {', '.join(packages)}; this takes minutes once", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        for some in (["torch"], ["torch", *packages]):
            _install(python, folder, some)
        stamp.write_text(fingerprint(packages))
    return str(python)


def fingerprint(packages: tuple[str, ...]) -> str:
    """What the file STAMP of a complete environment says."""
    return hashlib.sha256(PINS.read_bytes() + " ".join(packages).encode()).hexdigest()


def _install(python: Path, folder: Path, packages: list[str]) -> None:
    index = os.environ.get("ONECARD_TORCH_INDEX")
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(PINS), *packages]
    command += ["--extra-index-url", index] if index else []
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        raise RuntimeError(f"pip could not fill {folder}: {last}")
