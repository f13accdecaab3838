"""Functions of the user's by name: `module:function`, or `file.py:function`, from a file that need be no package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from toolkit.errors import RecipeError, did_you_mean, first_line

__all__ = ["function_of"]


def function_of(name: str, field: str) -> tuple[str, Callable[..., Any]]:
    """The function's own name, and the function. `field` is the recipe's, for messages.

    Raises:
        RecipeError: there is no such file, module or function, or it raises when it is imported.
    """
    where, _, attribute = name.rpartition(":")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # whatever the user's own file raises when it runs
        raise RecipeError(f"{field}: {where} cannot be imported: {first_line(error)}") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RecipeError(f"{field}: {where} has no function {attribute}{did_you_mean(attribute, dir(module))}")
    return attribute, function


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"onecard_own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module
