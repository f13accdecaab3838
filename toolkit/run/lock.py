"""One owner for a run folder: a lock file that names the process.

flock alone tells a second run only that somebody is there. It also lives on in worker processes that outlast a killed
parent for some seconds, so a lock whose named process is gone counts as left behind and is replaced.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit.errors import ResourceError

__all__ = ["LOCK", "owned"]

LOCK = ".lock"
_MOST_TRIES = 20


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold the run folder, which is made where it is missing.

    Raises:
        ResourceError: another process holds it, named by its PID; or the folder cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder, path)
    except OSError as error:
        raise ResourceError(
            f"training.output_dir: {folder} cannot be written ({error.strerror}); give another"
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(folder: Path, path: Path) -> int:
    for _ in range(_MOST_TRIES):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            if not _is_gone(owner):
                raise ResourceError(
                    f"{folder}: process {owner or 'of another onecard'} is training in it; wait for it, or give "
                    "another training.output_dir"
                ) from None
            path.unlink(missing_ok=True)  # held by a worker that outlived it
            continue
        if _is_same(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)  # somebody removed it between our two calls
    raise ResourceError(f"{folder}: its lock changes hands all the time; give another training.output_dir")


def _is_gone(owner: str) -> bool:
    """Whether the lock names a process of this machine that no longer runs."""
    pid, _, host = owner.partition(" on ")
    if not pid.isdigit() or host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
