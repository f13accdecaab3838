"""Files and folders that appear whole or not at all, and survive a power cut once they have.

The standard library renames atomically but neither syncs nor stages; every room that writes something a user keeps
writes it through here.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit.errors import RecipeError, ResourceError

__all__ = ["replaced_file", "staged_folder", "sync", "write_text"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to; it takes that place, durably, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; it becomes `target` when the block ends without an error.

    It is this process's alone, cleared of what a killed process left, and gone when the block fails. With `replace`
    a folder that is there already changes places with the new one in one step, where the file system can.

    Raises:
        ResourceError: it cannot be made, or another process is writing the same target.
        RecipeError: `target` appeared meanwhile, and `replace` is not set.
    """
    workplace = target.parent / f".{target.name}.partial"
    try:
        workplace.mkdir(parents=True, exist_ok=True)
        lock = os.open(workplace, os.O_RDONLY)
    except OSError as error:
        raise ResourceError(f"{target}: cannot be written ({error.strerror}); give another folder") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResourceError(f"{target}: another onecard is writing it; wait, or give another name") from None
        _clear(workplace)
        _recover(target)
        try:
            yield workplace
            _settle(workplace)
            _install(workplace, target, replace)
        except BaseException:
            shutil.rmtree(workplace, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    for leftover in folder.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _recover(target: Path) -> None:
    """Undo or end a replacement in two steps that was cut short between them."""
    if _aside(target).exists() and not target.exists():
        _aside(target).rename(target)
    shutil.rmtree(_aside(target), ignore_errors=True)


def _settle(folder: Path) -> None:
    """Sync everything, and give files the folder's own permissions: safetensors writes files nobody else may read."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
        sync(path)
    sync(folder)


def _install(workplace: Path, target: Path, replace: bool) -> None:
    if not target.exists():
        workplace.rename(target)
    elif not replace:
        raise RecipeError(f"{target}: somebody made it meanwhile; give another name")
    else:
        _exchange(workplace, target)
        shutil.rmtree(workplace)
    sync(target.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names atomically (renameat2, Linux 3.15), or in two steps where the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename and not rename(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE):
        return
    other.rename(_aside(other))
    one.rename(other)
    _aside(other).rename(one)
