"""The options that every benchmark of a recipe has."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["recipe_parser"]


def recipe_parser(description: str) -> argparse.ArgumentParser:
    """A parser that takes a recipe and what to change in it; read with `parse_intermixed_args`, so that options may
    stand anywhere. `description` is the script's docstring, of which the first line is shown."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser
