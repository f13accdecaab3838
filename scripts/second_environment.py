"""A second virtual environment with the pinned versions, for what must run where onecard is not installed.

Comparisons with stock software are only fair on a stock installation, of the same versions as here. pip's own
configuration holds; ONECARD_TORCH_INDEX names an index to take torch from, as in setup.sh.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

__all__ = ["STAMP", "fingerprint", "pins_here", "python_with"]

STAMP = "complete"


def pins_here() -> Path:
    """The constraints of the stack that this runs on; of the oldest where it is on neither."""
    root, here = Path(__file__).resolve().parents[1], f"transformers=={version('transformers')}"
    newest = root / "constraints-newest.txt"
    return newest if here in newest.read_text().splitlines() else root / "constraints.txt"


PINS = pins_here()


def python_with(folder: Path, packages: tuple[str, ...], pins: Path | None = PINS, alone: tuple[str, ...] = ()) -> str:
    """The Python of the environment in `folder`, made anew where it is missing, incomplete or of other versions.

    torch comes first, so that no other package's requirement chooses another build of it.

    Args:
        pins: a file of constraints; None where `packages` have their versions with them, torch first.
        alone: packages that are installed without what they ask for.

    Raises:
        RuntimeError: pip failed; its last line.
    """
    python, stamp = folder / "bin" / "python", folder / STAMP
    wanted = fingerprint((*packages, *alone), pins)
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"making {folder} with {', '.join((*packages, *alone))}; this takes minutes once", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        constraints = ["-c", str(pins)] if pins else []
        torch = "torch" if pins else packages[0]
        for some in ([torch], [torch, *packages], *([["--no-deps", "--no-build-isolation", *alone]] if alone else [])):
            _install(python, folder, [*constraints, *some])
        stamp.write_text(wanted)
    return str(python)


def fingerprint(packages: tuple[str, ...], pins: Path | None = PINS) -> str:
    """What the file STAMP of a complete environment says."""
    return hashlib.sha256((pins.read_bytes() if pins else b"") + " ".join(packages).encode()).hexdigest()


def _install(python: Path, folder: Path, packages: list[str]) -> None:
    index = os.environ.get("ONECARD_TORCH_INDEX")
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages]
    command += ["--extra-index-url", index] if index else []
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        raise RuntimeError(f"pip could not fill {folder}: {last}")
