"""Where a data set goes that does not fit in memory: a folder of this process's own, removed at its end.

`tempfile.TemporaryDirectory` removes a folder at a normal end, but leaves gigabytes behind a process that was killed,
and its place is often held in memory itself (`/tmp` as tmpfs).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from toolkit.errors import ResourceError

__all__ = ["no_room", "scratch_folder", "scratch_parent"]

_PREFIX = f"onecard-data-{os.getuid()}-"
_LARGE = Path("/var/tmp")
"""Where systemd's file-hierarchy(7) wants large temporary files; it is on disk."""


def scratch_parent() -> Path:
    """`TMPDIR` where it is set, else a temporary folder on disk, else Python's choice."""
    if not os.environ.get("TMPDIR") and os.access(_LARGE, os.W_OK | os.X_OK):
        return _LARGE
    return Path(tempfile.gettempdir())


def scratch_folder() -> Path:
    """A folder for this process's large files, removed at its end; those of killed processes are removed first.

    Raises:
        ResourceError: it cannot be made.
    """
    return Path(_locked_folder().name)


@cache  # which keeps it until the process ends
def _locked_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder whose lock is held until the process ends, however it does."""
    try:
        for old in scratch_parent().glob(f"{_PREFIX}*"):
            _remove_left_behind(old)
        while True:
            folder = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=scratch_parent(), ignore_cleanup_errors=True)
            with contextlib.suppress(FileNotFoundError):
                fcntl.flock(os.open(folder.name, os.O_RDONLY), fcntl.LOCK_EX)
            if Path(folder.name).is_dir():  # else another process took it for left behind before it was locked
                return folder
    except OSError as error:
        raise no_room(error) from None


def _remove_left_behind(folder: Path) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def no_room(error: OSError) -> ResourceError:
    """The one line for a disk that does not take the examples."""
    return ResourceError(
        f"{scratch_parent()}: no room for the examples ({error.strerror or error}); free some, or set TMPDIR to a "
        "folder with room"
    )
