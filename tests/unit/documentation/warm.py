"""Python children as forks of the test's own process: an interpreter that loads torch and the rest anew takes 5 to 8 s.

Nothing else is spared: the child has its own arguments, environment, folder, path and standard streams, forgets the
modules of scripts and tests, and runs the program as `__main__`. Its own Python children are begun in the same way.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NoReturn
from unittest import mock

from tests.unit.documentation.commands import ROOT

__all__ = ["warm_python"]

LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "toolkit.run", "toolkit.training")
OURS = tuple(str(ROOT / name) for name in ("scripts", "tests"))


@contextmanager
def warm_python() -> Iterator[None]:
    """While it holds, `subprocess` begins this Python (with a script or a module) as a fork."""
    for name in LIBRARIES:
        importlib.import_module(name)
    fresh_path(os.environ.get("PYTHONPATH", ""))
    with mock.patch.object(subprocess.Popen, "__init__", begin):
        yield


cold = subprocess.Popen.__init__


def begin(self: subprocess.Popen[Any], args: Any, *rest: Any, **options: Any) -> None:
    """As `Popen` does; but a child that would execute this Python becomes that program as it is."""
    words = [] if isinstance(args, str) else list(map(str, args))
    if words and words[0] == sys.executable and not {"-c", "-I"} & set(words[1:3]):
        options["preexec_fn"] = partial(become, words, options.get("env"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        cold(self, args, *rest, **options)


@cache
def fresh_path(pythonpath: str) -> list[str]:
    """`sys.path` of a new interpreter, without the script's own folder, which comes first."""
    command = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path))"]
    environment = {**os.environ, "PYTHONPATH": pythonpath}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    path: list[str] = json.loads(done.stdout)
    return path[1:]


def become(command: Sequence[str], environment: Mapping[str, str] | None) -> NoReturn:
    """Run `python …` in this process, just forked, and end it as the program ends."""
    code = 1
    try:
        _forget(environment)
        _run(list(command[1:]))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _forget(environment: Mapping[str, str] | None) -> None:
    """What is the test's and would not be there in a new process."""
    gc.freeze()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if 2 < int(name) != nowhere:  # their numbers stay taken: objects of the test may still close them
            os.dup2(nowhere, int(name), inheritable=False)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
        for number, mode in enumerate(("r", "w", "w"))
    )
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(OURS):
            del sys.modules[name]
    sys.path[:] = fresh_path(os.environ.get("PYTHONPATH", ""))
    for state in ("AcceleratorState", "GradientState", "PartialState"):  # what trained in the test's process left there
        getattr(sys.modules["accelerate.state"], state)._shared_state.clear()
    sys.modules["torch"].set_num_threads(1)  # OpenMP's threads did not come along
    warnings.resetwarnings()
    os.execve = lambda path, command, environment: become(command, environment)


def _run(arguments: list[str]) -> None:
    while arguments[0] in ("-u", "-W"):
        if arguments.pop(0) == "-W":
            warnings.simplefilter(arguments.pop(0))  # type: ignore[arg-type]
    if arguments[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        sys.argv = arguments
        runpy.run_path(os.path.abspath(arguments[0]), run_name="__main__")
