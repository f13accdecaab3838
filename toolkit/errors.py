"""The exception tree: one class per exit code, each message one line (what, where, what to do).

OnecardError
├── RecipeError      2   recipe or usage
├── DataError        3   rows, templates, masks
├── ModelError       4   model, adapter, checkpoint, artifact
│   └── PackingError     packed examples that the model's layers cannot keep apart
├── ResourceError    5   memory, disk, lock
├── DivergedError    6   non-finite loss or gradients
├── HubError         7   upload, download, permission
├── PreemptedError  75   asked to stop; rerun to resume
└── InterruptedRunError  130  interrupted by hand, saved
"""

from __future__ import annotations

import re

__all__ = [
    "DataError",
    "DivergedError",
    "HubError",
    "InterruptedRunError",
    "ModelError",
    "OnecardError",
    "PackingError",
    "PreemptedError",
    "RecipeError",
    "ResourceError",
    "cannot_pack",
    "card_failed",
    "did_you_mean",
    "first_line",
    "first_sentence",
    "machine_failed",
    "out_of_memory",
]


class OnecardError(Exception):
    """Base of every error a user can cause; `exit_code` is the command's exit status."""

    exit_code = 1


class RecipeError(OnecardError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class DataError(OnecardError):
    """The data cannot be read, or nothing in it can be trained on."""

    exit_code = 3


class ModelError(OnecardError):
    """The model, adapter, checkpoint or artifact is not what it should be."""

    exit_code = 4


class PackingError(ModelError):
    """Layers of the model cannot keep packed examples apart with the packages that are installed."""


class ResourceError(OnecardError):
    """Memory, disk or a lock is missing."""

    exit_code = 5


class DivergedError(OnecardError):
    """The loss or the gradients stopped being finite."""

    exit_code = 6


class HubError(OnecardError):
    """The Hub refused, or could not be reached."""

    exit_code = 7


class PreemptedError(OnecardError):
    """The run was asked to stop and has saved; the same command resumes it."""

    exit_code = 75


class InterruptedRunError(OnecardError):
    """The run was interrupted by hand and has saved; the same command resumes it."""

    exit_code = 130


def did_you_mean(name: str, candidates: list[str], most: int = 1, *, likeness: float = 0.5) -> str:
    """`"; did you mean X?"` for the nearest of `candidates`, or an empty string; `likeness` is difflib's, up to 1."""
    import difflib

    near = difflib.get_close_matches(name, candidates, n=most, cutoff=likeness)
    return f"; did you mean {', '.join(near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of a library's message that says something, for use inside one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def cannot_pack(error: BaseException) -> bool:
    """Whether transformers says that layers with a running state need another package to keep packed examples apart."""
    return isinstance(error, ValueError) and "keep packed sequences apart" in str(error)


def first_sentence(error: BaseException) -> str:
    """Of a library's message, without its stop: what is wrong, not what that library would do."""
    return first_line(error).partition(". ")[0].rstrip(".")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, by a card, by the system to torch, or to Python."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; it is not imported here
        return True
    words = str(error)
    return (
        "not enough memory" in words
        or "STATUS_ALLOC_FAILED" in words
        or ("alloc" in words.lower() and "memory" in words.lower())
    )


def card_failed(error: BaseException) -> bool:
    """Whether a card reported an error after which this process cannot use it any more."""
    said = re.search(r"CUDA error|\[CUDA\]: .*(illegal|misaligned|unspecified launch failure|assert)", str(error))
    return not out_of_memory(error) and (type(error).__name__ == "AcceleratorError" or said is not None)


def machine_failed(error: BaseException) -> bool:
    """Whether memory ran out or a card failed: nothing that another file or setting of the user's would mend."""
    return out_of_memory(error) or card_failed(error)
