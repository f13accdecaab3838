"""onecard: fine-tune open Mixture-of-Experts language models in 8-bit on one card.

    finished = run_recipe(load_recipe("recipes/quickstart.yaml"))
    print(finished.adapter)

`run_recipe` is what `onecard train` does, and gives the same folder. Its steps, one by one, are in `toolkit.run`.

The names are imported when they are first used, so that reading a recipe, or `onecard --help`, costs no torch.
transformers' `from_pretrained` reads our int8 checkpoints after `register()`, which is called here where transformers
is imported already.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

__all__ = [
    "Finished",
    "OnecardError",
    "Plan",
    "Recipe",
    "load_recipe",
    "make_plan",
    "register",
    "run_recipe",
    "verify",
]
__version__ = "0.1.0.dev0"

_HOMES = {
    "Finished": ("toolkit.run.job", "Finished"),
    "OnecardError": ("toolkit.errors", "OnecardError"),
    "Plan": ("toolkit.plan", "Plan"),
    "Recipe": ("toolkit.recipe", "Recipe"),
    "load_recipe": ("toolkit.recipe", "load"),
    "make_plan": ("toolkit.plan", "make_plan"),
    "register": ("toolkit.quant", "register"),
    "run_recipe": ("toolkit.run.job", "run"),
    "verify": ("toolkit.artifact", "verify_artifact"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


if sys.modules.get("transformers"):
    __getattr__("register")()
