#!/usr/bin/env python3
"""Write the recipe reference of the documentation from the schema's own docstrings.

.venv/bin/python scripts/recipe_reference.py docs/recipe.md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic_core import PydanticUndefined

from toolkit.recipe import Recipe, TrainSource


def reference() -> str:
    """Markdown: a table a section."""
    lines = ["# The recipe", "", "Written by `scripts/recipe_reference.py` from the schema; names are those of"]
    lines += ["transformers, PEFT and TRL. `onecard schema` prints the same as JSON Schema.", ""]
    for section, field in Recipe.model_fields.items():
        annotation: Any = field.annotation
        lines += [f"## {section}", "", *table(annotation)]
        if section == "data":
            lines += ["### An item of data.train", "", *table(TrainSource)]
    return "\n".join(lines)


def table(model: Any) -> list[str]:
    """What a section or an item is, and its fields."""
    lines = [" ".join(model.__doc__.split()), ""]
    lines += ["| field | default | values | what it is |", "|---|---|---|---|"]
    return [*lines, *(row(name, info) for name, info in model.model_fields.items()), ""]


def row(name: str, info: Any) -> str:
    """One field."""
    default = "required" if info.default is PydanticUndefined else f"`{info.default}`"
    text = " ".join(info.description.split()).replace("|", "\\|")
    return f"| `{name}` | {default} | {values(info.annotation)} | {text} |"


def values(annotation: Any) -> str:
    """The types, or the words that are allowed."""
    found = []
    for part in get_args(annotation) or (annotation,):
        if isinstance(part, str):
            found.append(f"`{part}`")
        elif get_origin(part) and type(part).__name__ == "_LiteralGenericAlias":
            found += [f"`{word}`" for word in get_args(part)]
        elif isinstance(part, type) and part is not type(None):
            found.append(part.__name__)
    return ", ".join(dict.fromkeys(found)) or "see the schema"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="written anew")
    parser.parse_args().page.write_text(reference(), encoding="utf-8")
