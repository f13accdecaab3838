"""The chat template for training that the installed TRL has in a published one's place.

Some published templates leave out or rewrite what earlier turns say (thoughts, empty tags), so that rows are refused.
TRL ships versions of them for training, by the exact text of the published one.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["training_template"]


def training_template(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> tuple[Path, str] | None:
    """File and text of TRL's template in the place of `template`, else of the tokenizer's; None where it has none."""
    from trl.chat_template_utils import get_training_chat_template

    known: Any = copy.copy(tokenizer)
    known.chat_template = template or tokenizer.chat_template
    try:
        text = get_training_chat_template(known)
    except (ValueError, TypeError, KeyError, AttributeError):  # a template that TRL does not know
        return None
    path = _files().get(text or "")
    return None if path is None else (path, str(text))


@cache
def _files() -> dict[str, Path]:
    """TRL's own, by their text."""
    import trl

    found = sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"))
    return {path.read_text(encoding="utf-8"): path for path in found}
