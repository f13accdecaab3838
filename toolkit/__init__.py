"""onecard: fine-tune open Mixture-of-Experts language models in 8-bit on one card.

    recipe = load_recipe("recipes/quickstart.yaml")
    plan = make_plan(recipe)
    model, tokenizer = load(plan)
    model = attach(model, plan)
    batches = build_batches(tokenizer, plan)
    result = train(model, tokenizer, batches, plan)
    artifact = package(result, plan)

The names are imported when they are first used, so that reading a recipe, or `onecard --help`, costs no torch.
transformers' `from_pretrained` reads our int8 checkpoints after `register()`, which is called here where transformers
is imported already.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

__all__ = [
    "OnecardError",
    "Plan",
    "Recipe",
    "attach",
    "build_batches",
    "load",
    "load_recipe",
    "make_plan",
    "package",
    "register",
    "train",
    "verify",
]
__version__ = "0.1.0.dev0"

_HOMES = {
    "OnecardError": ("toolkit.errors", "OnecardError"),
    "Plan": ("toolkit.plan", "Plan"),
    "Recipe": ("toolkit.recipe", "Recipe"),
    "attach": ("toolkit.run", "attach"),
    "build_batches": ("toolkit.run", "build_batches"),
    "load": ("toolkit.run", "load"),
    "load_recipe": ("toolkit.recipe", "load"),
    "make_plan": ("toolkit.plan", "make_plan"),
    "package": ("toolkit.run", "package"),
    "register": ("toolkit.quant", "register"),
    "train": ("toolkit.run", "train"),
    "verify": ("toolkit.artifact", "verify_artifact"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


if "transformers" in sys.modules:
    __getattr__("register")()
