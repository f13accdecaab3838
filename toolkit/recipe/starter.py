"""The starter recipe that `onecard init` writes: every field with its docstring, the defaults commented out."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticUndefined

from toolkit.recipe.schema import Recipe

__all__ = ["starter"]

_EXAMPLES = {
    ("model", "model_name_or_path"): "allenai/OLMoE-1B-7B-0924-Instruct",
    ("data", "train"): "data/train.jsonl",
}


def starter(path: str, given: Mapping[tuple[str, str], Any] = _EXAMPLES) -> str:
    """YAML text, made from the schema, that `parse` accepts; its first line is the command that runs it.

    Args:
        given: values by (section, key); without any, examples of what must be given.
    """
    given = given or _EXAMPLES
    lines = [f"# onecard train {shlex.quote(path)}", "# What is commented out shows its default."]
    for section, field in Recipe.model_fields.items():
        annotation: Any = field.annotation
        fields = [_field(given.get((section, key)), key, info) for key, info in annotation.model_fields.items()]
        required = any((section, key) in given for key in annotation.model_fields)
        lines += ["", f"# {annotation.__doc__.splitlines()[0]}", f"{'' if required else '# '}{section}:"]
        lines += [line for block in fields for line in block]
    return "\n".join(lines) + "\n"


def _field(value: Any, key: str, info: Any) -> list[str]:
    comment = [f"  # {line}" for line in textwrap.wrap(" ".join(info.description.split()), 110)]
    if value is not None:
        return [*comment, f"  {key}: {json.dumps(value)}"]
    default = None if info.default is PydanticUndefined else info.default
    return [*comment, f"  # {key}: {json.dumps(default)}"]
