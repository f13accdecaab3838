"""Whether a run may be packaged, asked before it trains: everything that could stop an artifact and is known by then.

The last look, at the bytes that are written, comes after hours of training, and what it finds in a template or a prompt
could be changed only in another run. So the tokenizer is written and read back here, and the recipe is looked at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.artifact.allowed import Known, base_texts, leaves
from toolkit.artifact.privacy import canaries, finds
from toolkit.artifact.redact import portable
from toolkit.artifact.tokenizer import require_same_tokenizer, write_tokenizer
from toolkit.errors import ModelError, RecipeError

__all__ = ["require_packageable"]

_PROSE = "system_prompt"
_TEMPLATE = "data.chat_template_path"


def require_packageable(
    tokenizer: PreTrainedTokenizerBase, recipe: Mapping[str, Any], base_folder: str | Path | None = None
) -> None:
    """Raise unless tokenizer, chat template and recipe may go into an artifact; needs no model, and takes seconds.

    Args:
        tokenizer: with the recipe's chat template on it. recipe: values by `section.field`.
        base_folder: the base's files; what stands in them is no find.

    Raises:
        RecipeError: a value of the recipe, or the template it names, holds a token or a path of this machine.
        ModelError: the base's tokenizer cannot be written so that it reads back the same.
    """
    known = Known(base_texts(Path(base_folder) if base_folder else None))
    allowed = {find for text in known.base for find, _ in finds(text)}
    for key, value in recipe.items():
        for kind in _told(value, allowed, prose=key.endswith(_PROSE)):
            raise RecipeError(f"{key}: holds {kind}, and the recipe goes into the artifact: write it without")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tokenizer(tokenizer, folder, Path(base_folder) if base_folder else None)
        if found := next(canaries(folder, known=known), None):
            raise _refusal(found, recipe.get(_TEMPLATE), base_folder)
        try:
            require_same_tokenizer(tokenizer, folder)
        except ModelError as error:
            raise ModelError(str(error).replace(str(folder), str(base_folder or "this base"))) from None


def _told(value: Any, allowed: set[str], *, prose: bool) -> Iterator[str]:
    """What is found in a value as it would be published. Paths are cut short there, but prose must stay as it is."""
    for text in leaves(value if prose else portable(value)):
        yield from (kind for find, kind in finds(text) if find not in allowed)
        if prose and portable({_PROSE: text})[_PROSE] != text:
            yield "a folder of this machine, or a login"


def _refusal(found: str, template: str | None, base_folder: str | Path | None) -> RecipeError | ModelError:
    if template:
        return RecipeError(f"{_TEMPLATE}: {template}: {found}, and it goes into the artifact: write it without")
    return ModelError(f"{base_folder or 'this base'}: {found}: remove it from the base's files")
