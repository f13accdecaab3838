"""What may leave the machine: values without secrets, local paths or rows of the data.

A resolved recipe, a tokenizer's configuration and an evaluation's results all carry such things. There is no library
for it: what counts as harmless depends on what our own artifact is for.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["SECRET", "figures", "portable"]

# Not every `…_token` is a secret: tokenizers have an `eos_token`.
_SECRET_KEY = re.compile(
    r"(^|_)(secret|password|passwd|api_?key|credentials?)$|^token$|(hub|hf|auth|access|api|bearer)_token$",
    re.IGNORECASE,
)
SECRET = re.compile(r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}")
_TIMING = re.compile(r"(^|_)(seconds?|runtime|duration|milliseconds)(_|$)")
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_ABSOLUTE = re.compile(r"(?:file://)?(?:/|~[^/\s]*/|\.\.[/\\]|[A-Za-z]:[/\\])[^\n]*")


def portable(value: Any) -> Any:
    """`value` (JSON-like) without secrets and without paths of this machine.

    Keys that name a secret are left out; a string that is an absolute path, or leads out of the working folder, keeps
    only its last part; the home, working and temporary folders are cut out of longer text; tokens and URL logins are
    removed. Non-finite numbers become None, as JSON has none; a date becomes text.
    """
    if isinstance(value, Mapping):
        return {
            str(k): _without_secrets(v) if k == "system_prompt" and isinstance(v, str) else portable(v)
            for k, v in value.items()
            if not _SECRET_KEY.search(str(k)) or _is_number(v)
        }
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return _portable_text(value)
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)  # a date of the recipe's


def figures(value: Any) -> Any:
    """The numbers of nested results under their keys; text, where samples and answers live, is left out.

    So is what the clock says: the same run on the same machine is to give the same bytes.
    """
    if isinstance(value, Mapping):
        told = {k: v for k, v in value.items() if not _TIMING.search(str(k))}
        kept = {str(k): figures(v) for k, v in told.items() if isinstance(v, Mapping) or _is_number(v)}
        return {k: v for k, v in kept.items() if v != {}}
    return portable(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _portable_text(text: str) -> str:
    if _ABSOLUTE.fullmatch(text) and len(parts := [p for p in re.split(r"[/\\]", text) if p]) > 1:
        return SECRET.sub("[removed]", parts[-1])
    return _without_secrets(text)


def _without_secrets(text: str) -> str:
    """Prose, which may begin with a slash without being a path."""
    text = _URL_LOGIN.sub("", SECRET.sub("[removed]", text))
    # That there is a temporary folder says nothing of this machine; what lies in it does.
    whole, below = r"(?![\w-]|\.\w)", r"(?=/\w)"
    ends = ((Path.cwd(), ".", whole), (Path.home(), "~", whole), (Path(tempfile.gettempdir()), "~", below))
    for folder, stand_in, end in ends:
        if len(folder.parts) > 1:
            text = re.sub(rf"{re.escape(str(folder))}{end}", stand_in, text)
    return text
