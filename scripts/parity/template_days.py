"""The command on a day of one's choice: each in a process of its own, whose clock is moved.

A preloaded library (`clock.c`) moves the clock, so nothing in Python knows of it. The process that is started loads
the libraries once, and every command is a fork of it. A command can be stopped when a file appears, told what its
model answers, and made to write down what its model was asked.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.harness.faulty import compiler  # noqa: E402

__all__ = ["Days", "Done", "dictate"]


@dataclass(frozen=True)
class Done:
    """What came of a command; `asked` are the conversations its model was given, each with its prompt's tokens."""

    code: int
    out: str
    err: str
    asked: tuple[tuple[list[dict[str, Any]], list[int]], ...] = ()

    @property
    def last_line(self) -> str:
        """Where an error is told."""
        return (self.err.strip().splitlines() or [""])[-1]


class Days:
    """Runs commands on days.

    Raises:
        RuntimeError: there is no C compiler.
    """

    def __init__(self) -> None:
        if (command := compiler()) is None:
            raise RuntimeError("no C compiler here, and no ziglang package, to move the clock")
        self._scratch = tempfile.TemporaryDirectory()
        self._folder = Path(self._scratch.name)
        library = self._folder / "clock.so"
        source = Path(__file__).with_name("clock.c")
        subprocess.run([*command, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._loaded = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **offline, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Days:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._loaded.stdin
        assert self._loaded.stdout
        self._loaded.stdin.close()
        self._loaded.wait()
        self._loaded.stdout.close()
        self._scratch.cleanup()

    def run(
        self,
        day: datetime.date,
        *arguments: object,
        said: str = "",
        answers: Sequence[Sequence[int]] = (),
        until: Path | None = None,
    ) -> Done:
        """`python -m toolkit ARGUMENTS` at noon of `day`.

        Args:
            said: stdin.
            answers: tokens that the model writes, one list an answer; its own where there are none.
            until: the command gets SIGTERM when this is there.
        """
        assert self._loaded.stdin
        assert self._loaded.stdout
        (self._folder / "in").write_text(said)
        (self._folder / "asked").unlink(missing_ok=True)
        noon = datetime.datetime.combine(day, datetime.time(12))
        wanted = {
            "arguments": list(map(str, arguments)),
            "noon": noon.timestamp(),
            "answers": list(map(list, answers)),
            "until": until and str(until),
            "folder": str(self._folder),
        }
        print(json.dumps(wanted), file=self._loaded.stdin, flush=True)
        code = int(self._loaded.stdout.readline())
        out, err = ((self._folder / name).read_text(errors="replace") for name in ("out", "err"))
        asked = self._folder / "asked"
        lines = asked.read_text().splitlines() if asked.exists() else []
        return Done(code, out, err, tuple(tuple(json.loads(line)) for line in lines))


def _main() -> None:
    """Load everything, then a fork for each line of stdin."""
    import toolkit.cli
    import toolkit.report.terminal
    import toolkit.run
    import toolkit.serving  # noqa: F401

    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            _command(**wanted)
        print(_ended(child, wanted["until"]), flush=True)


def _ended(child: int, until: str | None) -> int:
    """The exit code of a process, which is asked to stop once `until` is there."""
    while until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if Path(until).exists():
            os.kill(child, signal.SIGTERM)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _command(arguments: list[str], noon: float, answers: list[list[int]], until: str | None, folder: str) -> None:
    code = 99
    try:
        for number, (name, mode) in enumerate((("in", "r"), ("out", "w"), ("err", "w"))):
            with open(Path(folder) / name, mode) as file:
                os.dup2(file.fileno(), number)
        sys.stdin = os.fdopen(0, closefd=False)
        ctypes.CDLL(None).clock_move(int(noon - time.time()))
        if datetime.date.today() != datetime.date.fromtimestamp(noon):
            raise RuntimeError("the clock could not be moved")
        _listen(Path(folder) / "asked")
        if answers:
            dictate(answers)
        sys.argv = ["onecard", *arguments]
        runpy.run_module("toolkit", run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _listen(path: Path) -> None:
    """Write down every conversation that the model is asked to answer, with its prompt."""
    from toolkit.data import Dialogue

    prompt_ids = Dialogue.prompt_ids

    def told(self: Dialogue, messages: Any, *others: Any) -> list[int]:
        ids = prompt_ids(self, messages, *others)
        with path.open("a") as file:
            print(json.dumps([list(messages), ids]), file=file)
        return ids

    Dialogue.prompt_ids = told  # type: ignore[method-assign]


def dictate(answers: list[list[int]]) -> None:
    """Let every model write these answers, one after the other."""
    import torch
    from transformers import GenerationMixin

    pending = iter(answers)

    def generate(self: Any, input_ids: torch.Tensor, streamer: Any = None, **_: Any) -> torch.Tensor:
        written = torch.tensor([next(pending)])
        if streamer is not None:
            streamer.put(input_ids)
            for token in written[0]:
                streamer.put(token[None])
            streamer.end()
        return torch.cat([input_ids, written], dim=1)

    GenerationMixin.generate = generate


if __name__ == "__main__":
    _main()
