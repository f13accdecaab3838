"""The reward of a program: whether the code in an answer passes its row's tests, run where it can do no harm.

Others run such code in containers or on servers of their own (TRL's example on E2B); this needs neither, and Linux.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from toolkit.errors import RecipeError
from toolkit.rewards.confined import UNCONFINED

__all__ = ["code_in", "passes", "require_confinement", "share_that_passes"]

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_SECONDS = 5.0
"""That one answer's tests may take, where the recipe does not say."""


def share_that_passes(texts: Sequence[str], tests: Sequence[object], seconds: float | None) -> list[float | None]:
    """1 for each answer whose code passes its row's tests, 0 for others; None where the row has none."""
    limit = _SECONDS if seconds is None else seconds

    def one(text: str, test: object) -> float | None:
        lines = "\n".join(map(str, test)) if isinstance(test, (list, tuple)) else str(test or "")
        return float(passes([code_in(text), lines], limit)) if lines.strip() else None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(one, texts, tests))


def code_in(text: str) -> str:
    """The last block of Python in an answer, or of no stated language; all of it where there is no block."""
    blocks = [code for language, code in _BLOCK.findall(text) if language.lower() in ("", "py", "python", "python3")]
    return str(blocks[-1]) if blocks else text


def passes(parts: Sequence[str], seconds: float) -> bool:
    """Whether these pieces of Python run to their end, one after the other in one program.

    Raises:
        RecipeError: this machine cannot confine a program.
    """
    token = secrets.token_hex()
    with tempfile.TemporaryDirectory() as folder:
        given = {"parts": list(parts), "folder": folder, "seconds": seconds, "token": token}
        process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("confined.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            text=True,
        )
        try:
            said, _ = process.communicate(json.dumps(given) + "\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            said = ""
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == UNCONFINED:
        raise RecipeError(f"rewards.functions: tests: no program can be confined here ({said.strip()})")
    return said == token


@cache
def require_confinement() -> None:
    """Try it once.

    Raises:
        RecipeError: this machine cannot confine a program.
    """
    if not passes(["1"], 30.0):
        raise RecipeError("rewards.functions: tests: Python does not start where programs are confined")
