"""The process in which rewards are computed: `python -m toolkit.rewards.worker`, started by `toolkit.rewards.judge`.

A reward is other people's code that runs thousands of times beside a model in training. Here it cannot take the run's
memory, block it for ever, or end it. Lines of JSON come and go through stdin and stdout; what a reward prints goes to
stderr.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from toolkit.errors import RecipeError, first_line
from toolkit.rewards.functions import function_of
from toolkit.rewards.measures import BUILT_IN, TESTS, measured, prepare

__all__ = ["main"]

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_HIDDEN = ("texts", "columns")
"""What functions of the user's are not given as it stands."""


_GIVEN = ("prompts", "completions", "completion_ids", "answer", "solution", "trainer_state", "log_metric", "log_extra")
"""What they are given beside columns."""


class _Unusable(Exception):
    """A reward's answer that is no list of numbers."""


def main() -> None:
    """Answer requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    given = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_DATA, (given["memory"], given["memory"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    loaded: list[_Loaded] = []
    batch: dict[str, Any] = {}

    def reply(value: Mapping[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    for number, wanted in enumerate(given["rewards"]):
        try:
            loaded.append(_Loaded(**wanted))
            if given["columns"] is not None:
                loaded[-1].require_given(given["columns"])
        except BaseException as error:
            reply({"error": _said(error), "reward": number})
            return
    reply({"loaded": len(loaded)})
    for line in sys.stdin:
        request = json.loads(line)
        if "batch" in request:
            batch = request["batch"]
            continue
        try:
            reply(loaded[request["reward"]].call(batch))
        except BaseException as error:
            reply({"error": _said(error)})


class _Loaded:
    """One reward, ready to be called.

    Args:
        function: a built-in's name, or `file.py:function`. options: of a built-in.
    """

    def __init__(self, function: str, options: dict[str, Any]) -> None:
        self.name, self.options = function, options
        self.own: Callable[..., Any] | None = None
        if function in BUILT_IN or function == TESTS:
            prepare(function, options)
        else:
            _, self.own = function_of(function, "rewards.functions")

    def require_given(self, columns: Sequence[str]) -> None:
        """Raise `RecipeError` where the function has to be given what is neither ours nor one of these columns."""
        known = {*_GIVEN, *columns}
        try:
            parameters = inspect.signature(self.own).parameters.values() if self.own else ()
        except (TypeError, ValueError):
            return
        named = (each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL))
        if lacks := next((each.name for each in named if each.default is each.empty and each.name not in known), None):
            raise RecipeError(f"rewards.functions: {self.name} needs {lacks}; name that column in rewards.columns")

    def call(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Rewards by completion, and what the function logged."""
        if self.own is None:
            return {"values": measured(self.name, self.options, batch)}
        logged: dict[str, list[float]] = {}
        given = {**batch["columns"], **{key: value for key, value in batch.items() if key not in _HIDDEN}}
        given["answer"] = batch["columns"].get("answer", batch["answer"])  # as it stands in a column that is asked for
        given.setdefault("solution", batch["answer"])  # TRL's own rewards call it so
        given["trainer_state"] = SimpleNamespace(**batch["trainer_state"])
        given["log_metric"] = lambda name, value: logged.setdefault(str(name), []).append(float(value))
        given["log_extra"] = lambda column, values: None
        found = self.own(**_accepted(self.own, given))
        if inspect.isawaitable(found):
            found = asyncio.run(_awaited(found))
        return {
            "values": _numbers(found, len(batch["completions"])),
            "metrics": {name: sum(values) / len(values) for name, values in logged.items()},
        }


async def _awaited(found: Any) -> Any:
    return await found


def _accepted(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function has a name for; all of them where it takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return given
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}


def _numbers(found: Any, wanted: int) -> list[float | None]:
    """The rewards as finite numbers, None where the function does not apply."""
    if isinstance(found, (str, bytes)) or not (isinstance(found, Sequence) or hasattr(found, "tolist")):
        raise _Unusable(f"gave a {type(found).__name__}, not a list with a number for each of {wanted} completions")
    values = found.tolist() if hasattr(found, "tolist") else list(found)
    if not isinstance(values, list) or len(values) != wanted:
        count = len(values) if isinstance(values, list) else 1
        raise _Unusable(f"gave {count} rewards for {wanted} completions")
    return [_number(number, value) for number, value in enumerate(values, 1)]


def _number(place: int, value: Any) -> float | None:
    if value is None:
        return None
    try:
        found = math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception:
        found = math.nan
    if not math.isfinite(found):
        raise _Unusable(f"gave {str(value)[:40]!s} for completion {place} of its batch, no finite number")
    return found


def _said(error: BaseException) -> str:
    if isinstance(error, _Unusable):
        return str(error)
    if isinstance(error, RecipeError):
        return first_line(error)
    if isinstance(error, MemoryError):
        return "took more than its memory, rewards.memory_limit"
    return f"raised {type(error).__name__}: {first_line(error)}"


if __name__ == "__main__":
    main()
