"""`key=a,b,c` on the command line to trials: every combination, each named after what sets it apart.

Ray Tune's `grid_search` makes the same combinations but names trials by random letters, and a run folder must have the
same name at every start for a rerun to go on with it.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.errors import RecipeError

__all__ = ["Trial", "expand"]

_OPENING, _CLOSING = "[{(", "]})"
_NOT_IN_NAMES = re.compile(r"[^\w.=+-]+")


@dataclass(frozen=True)
class Trial:
    """One combination: its run folder's name, its value of each varied key, and all its overrides."""

    name: str
    values: dict[str, str]
    overrides: tuple[str, ...]


def expand(arguments: Sequence[str]) -> list[Trial]:
    """All combinations of the arguments' values, the last key varying fastest.

    Args:
        arguments: `section.key=value`, or `section.key=a,b` for a varied one; commas within brackets divide nothing.

    Raises:
        RecipeError: nothing is varied, or something is no `key=value`, given twice or empty.
    """
    given: dict[str, list[str]] = {}
    for argument in arguments:
        key, sign, text = argument.partition("=")
        values = [value.strip() for value in _split(text)]
        if not sign or not key or not all(values):
            raise RecipeError(f"{argument}: give section.key=value, or section.key=a,b,c to vary it")
        if key in given or len(set(values)) < len(values):
            raise RecipeError(f"{argument}: {key if key in given else 'a value'} is there twice; keep one")
        given[key] = values
    varied = {key: values for key, values in given.items() if len(values) > 1}
    if not varied:
        raise RecipeError("nothing is varied: give at least one section.key=a,b, such as lora.r=8,16")
    fixed = [f"{key}={values[0]}" for key, values in given.items() if key not in varied]
    combinations = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    names = _names(combinations)
    return [
        Trial(name, values, (*fixed, *(f"{key}={value}" for key, value in values.items())))
        for name, values in zip(names, combinations, strict=True)
    ]


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in _OPENING) - (character in _CLOSING)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _names(combinations: Sequence[dict[str, str]]) -> list[str]:
    """`r=8_learning_rate=1e-4`: short keys where they are clear, no character that a file system or shell minds."""
    leaves = Counter(key.rpartition(".")[2] for key in combinations[0])
    short = {key: leaf if leaves[leaf := key.rpartition(".")[2]] == 1 else key for key in combinations[0]}
    names = ["_".join(f"{short[key]}={value}" for key, value in each.items()) for each in combinations]
    names = [_NOT_IN_NAMES.sub("-", name) for name in names]
    seen = Counter(names)
    return [name if seen[name] == 1 else f"{name}.{index + 1}" for index, name in enumerate(names)]
