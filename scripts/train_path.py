#!/usr/bin/env python3
"""What someone who follows `onecard train` has to read: files on the way of three steps, and switches between them.

    .venv/bin/python scripts/train_path.py [--list] [RECIPE [KEY=VALUE …]]

Runs the recipe (the quickstart by default) in this process under `sys.setprofile`. A file is on the way when one of its
functions is called, not when it is merely imported: no module's or class's body counts. A switch is an ordered pair of
files of which the first calls into the second; it goes back and forth when the second calls into the first, too. With
--list, each file and its switches.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HOUSE = str(ROOT / "toolkit") + "/"
SHORT = ("training.max_steps=3", "data.max_samples=200", "eval.max_samples=8")

sys.path.insert(0, str(ROOT))


class Way:
    """Files entered and switches made."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.switches: Counter[tuple[str, str]] = Counter()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """What `sys.setprofile` calls."""
        callee = frame.f_code.co_filename
        is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED
        if event != "call" or not callee.startswith(HOUSE) or not is_function:
            return
        self.files.add(callee)
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(HOUSE):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != callee:
            self.switches[caller.f_code.co_filename, callee] += 1


def main() -> int:
    """Run and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="each file and what it calls into")
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes" / "quickstart.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    from toolkit.cli import main as onecard

    seen = Way()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ONECARD_CACHE"] = f"{folder}/cache"  # a step is rehearsed each time, not only the first
        sys.argv = ["onecard", "train", arguments.recipe, f"training.output_dir={folder}/run", *SHORT]
        sys.argv += arguments.overrides
        threading.setprofile(seen)
        sys.setprofile(seen)
        try:
            onecard()
        except SystemExit as end:
            if end.code:
                raise
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    both = [pair for pair in seen.switches if pair[::-1] in seen.switches]
    print(f"files {len(seen.files)}, switches {len(seen.switches)}, of which back and forth {len(both)}")
    if arguments.list:
        for caller in sorted(seen.files):
            into = sorted(callee.removeprefix(HOUSE) for one, callee in seen.switches if one == caller)
            print(f"{caller.removeprefix(HOUSE)} -> {' '.join(into)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
