"""What to type next: the last lines of every verb, as commands that can be pasted.

Light, because the lightest verbs end with it too.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["next_commands"]


def _program() -> str:
    """How this process was started, to be typed again."""
    if Path(sys.argv[0]).name == "__main__.py":
        return f"{os.path.relpath(sys.executable)} -m toolkit"
    return os.path.relpath(sys.argv[0])


def next_commands(console: Console, *commands: str) -> None:
    """Show commands without their program's name, under a heading; whoever ran a path gets that path again."""
    name = "onecard" if shutil.which("onecard") else _program()
    console.print("[bold]next[/bold]")
    for command in commands:
        console.print(f"  {name} {command}", markup=False)
