"""Runs a model's Python code where it can do no harm: `python -I confined.py`, started by `toolkit.rewards.programs`.

The code is alone in namespaces of its own for users, processes, networks and messages: nothing answers it, and nothing
that it starts outlives it. By Landlock it reads Python's own folders, and writes to one temporary folder. That takes
Linux 5.13. Only the standard library is imported, since this is started for every answer.

Source of the calls: Linux' man-pages, unshare(2), landlock(7), prctl(2).
"""

import ctypes
import json
import os
import platform
import resource
import signal
import sys
from typing import Any, TextIO

__all__ = ["UNCONFINED", "main"]

UNCONFINED = 97
"""Exit status where this machine cannot confine code; why is on stdout."""
_NEW_NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000
"""Of users, processes, networks and messages."""
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38
_ALL_RIGHTS, _RIGHTS_BY_VERSION = (1 << 13) - 1, {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_READS = 1 << 0 | 1 << 2 | 1 << 3
"""Of a folder: to execute and read its files and to list it."""
_FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14
"""Those that a file can have."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_SHARED = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
_MOST_WRITTEN = 16 << 20
"""Bytes of a file."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64)]


class _Below(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def main() -> None:
    """Run what stdin says in a line of JSON: `parts` of code, one after the other, in `folder`, for so many `seconds`.

    Where all ran to their end, and only then, `token` is on stdout.
    """
    _libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    given = json.loads(sys.stdin.readline())
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        _isolate(given["folder"])
    except OSError as error:
        told.write(f"{error.strerror}\n")
        told.flush()
        os._exit(UNCONFINED)
    child = os.fork()  # the first process of its namespace: when it ends, so do all others in it
    if not child:
        _libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        _run(given, told)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0x7F)


def _run(given: dict[str, Any], told: TextIO) -> None:
    seconds = max(1, int(given["seconds"]))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_WRITTEN, _MOST_WRITTEN))
    names = {"__name__": "__main__"}
    try:
        for part in given["parts"]:
            exec(compile(part, "<answer>", "exec"), names)  # noqa: S102, what all of this is for
    except BaseException:
        os._exit(1)
    told.write(given["token"])
    told.flush()
    os._exit(0)


def _isolate(folder: str) -> None:
    """Into namespaces of its own, and away from all files but those that Python needs and this folder.

    Raises:
        OSError: this machine has no way to.
    """
    _checked(_libc.unshare(_NEW_NAMESPACES), "namespaces for users are switched off")
    version = _checked(_syscall(_CREATE_RULESET, None, 0, 1), "Linux has no Landlock here")
    rights = _ALL_RIGHTS | sum(right for since, right in _RIGHTS_BY_VERSION.items() if version >= since)
    handled = _Ruleset(rights)
    rules = _checked(_syscall(_CREATE_RULESET, ctypes.byref(handled), ctypes.sizeof(handled), 0), "Landlock")
    for path in {sys.prefix, sys.base_prefix, *_SHARED}:
        _allow(rules, path, _READS, rights)
    for path in _DEVICES:
        _allow(rules, path, _READS | 1 << 1, rights)
    _allow(rules, folder, rights, rights)
    _checked(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    _checked(_syscall(_RESTRICT_SELF, rules, 0), "Landlock")
    os.close(rules)


def _allow(rules: int, path: str, allowed: int, rights: int) -> None:
    if not os.path.exists(path):
        return
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    below = _Below(allowed & rights & (-1 if os.path.isdir(path) else _FILE_RIGHTS), place)
    try:
        _checked(_syscall(_ADD_RULE, rules, 1, ctypes.byref(below), 0), "Landlock")
    finally:
        os.close(place)


def _syscall(number: int, *arguments: Any) -> int:
    if platform.machine() not in ("x86_64", "aarch64"):  # elsewhere the same numbers, but nobody tried
        raise OSError(38, f"not on {platform.machine()}")
    return int(_libc.syscall(ctypes.c_long(number), *arguments))


def _checked(found: int, what: str) -> int:
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return found


if __name__ == "__main__":
    main()
