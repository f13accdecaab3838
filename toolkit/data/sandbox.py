"""Tries a chat template in a process of its own, short of time and memory, before it is used here.

transformers renders templates in Jinja's sandbox, which keeps them from attributes and code, but not from looping for
ever or doubling a string until memory ends. A template comes with a checkpoint, so from strangers.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import warnings
from collections.abc import Callable, Hashable

from toolkit.errors import DataError

__all__ = ["MOST_BYTES", "MOST_SECONDS", "require_frugal"]

MOST_SECONDS = 1
"""Of processor time, for a handful of short conversations, which take a well-meant template milliseconds."""
_PATIENCE = 60.0
"""Seconds of waiting for them on a machine that does something else."""
MOST_BYTES = 256 << 20
"""Memory beyond what the process has already."""


_tried: set[Hashable] = set()
"""What was found frugal in this process: a fork of a large one takes long."""


def require_frugal(render: Callable[[], object], key: Hashable) -> None:
    """Run `render` in a fork, once for each `key`; errors that it raises are not this function's business.

    Raises:
        DataError: it needs more than `MOST_SECONDS` of processor time or `MOST_BYTES`.
    """
    if key in _tried:
        return
    watch, held = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: this one runs Python alone
        child = os.fork()
    if child == 0:
        _render_and_leave(render, watch)
    os.close(held)
    # The pipe closes when the child is gone: a wait with a time limit, which waitpid has not.
    if not select.select([watch], [], [], _PATIENCE)[0]:
        os.kill(child, signal.SIGKILL)
    os.close(watch)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        raise DataError(f"chat template: not done with a short conversation after {MOST_SECONDS} s; give another")
    if code != 0:
        raise DataError(
            f"chat template: needs more than {MOST_BYTES >> 20} MiB for a short conversation; give another as "
            "data.chat_template_path"
        )
    _tried.add(key)


def _render_and_leave(render: Callable[[], object], watch: int) -> None:
    code = 1
    try:
        os.close(watch)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        most = _address_space() + MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        render()
        code = 0
    except MemoryError:
        pass
    except BaseException:  # the template's own refusals are told where it is used
        code = 0
    finally:
        os._exit(code)


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[0]) * resource.getpagesize()
