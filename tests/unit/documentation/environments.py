"""Second environments for scripts that want one: this one's packages without ours, and stand-ins for others' programs.

A fresh environment takes a registry and minutes. What is installed here, linked into a folder without onecard and what
came with it, is the same stock software at the same versions. vLLM and llama.cpp are not installed here: their side
of the comparison is played by a few lines on stock transformers and PEFT, our side and the verdict are the scripts'.
"""

from __future__ import annotations

import sys
import sysconfig
import venv
from pathlib import Path

from scripts.parity.llama_cpp import PACKAGES
from scripts.second_environment import STAMP, fingerprint

__all__ = ["PEERS", "STOCK", "llama_stand_in", "stock_environment", "vllm_stand_in"]

STOCK = ("torch", "transformers", "peft")
PEERS = ("transformers", "peft", "trl", "bitsandbytes", "experts4bit-qlora==0.58.1")
"""Of the benchmarks; the last is not here, so that its arm is left out."""
OURS = ("toolkit", "onecard", "_editable", "__editable__")
MORE = {"trl": "trl", "datasets": "trl", "bitsandbytes": "bitsandbytes"}
"""What a stock environment has not, though onecard's has, and the package that brings it."""
HERE = Path(__file__).parent


def stock_environment(folder: Path, packages: tuple[str, ...] = STOCK) -> Path:
    """An environment of this one's packages without onecard, and without what `packages` does not ask for."""
    venv.create(folder, with_pip=False, symlinks=True)
    (target,) = folder.glob("lib/python*/site-packages")
    left_out = (*OURS, *(name for name, bringer in MORE.items() if bringer not in packages))
    for kind in ("purelib", "platlib"):
        for path in Path(sysconfig.get_paths()[kind]).iterdir():
            link = target / path.name
            if not path.name.startswith(left_out) and path.suffix != ".pth" and not link.is_symlink():
                link.symlink_to(path)
    (folder / STAMP).write_text(fingerprint(packages))
    return folder


def vllm_stand_in(folder: Path) -> Path:
    """A Python whose `vllm` is `stand_ins/vllm`."""
    folder.mkdir()
    return _python(folder / "python", f"PYTHONPATH={HERE / 'stand_ins' / 'vllm'} exec {sys.executable}")


def llama_stand_in(folder: Path) -> Path:
    """An environment whose Python does llama.cpp's side by `stand_ins/llama.py`."""
    (folder / "bin").mkdir(parents=True)
    (folder / "llama.cpp" / "conversion").mkdir(parents=True)
    _python(folder / "bin" / "python", f"exec {sys.executable} {HERE / 'stand_ins' / 'llama.py'}")
    (folder / STAMP).write_text(fingerprint(PACKAGES))
    return folder


def _python(path: Path, command: str) -> Path:
    path.write_text(f'#!/bin/sh\n{command} "$@"\n')
    path.chmod(0o755)
    return path
