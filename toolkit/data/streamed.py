"""An answer read while it is being written: what comes of its thought and text, and its calls once it has ended.

The reader of whole answers reads what is there again and again, and what it adds is sent. An end that may become a
mark (`</thi`, `<tool_`) is held back until it is one or none, and so is all from the first mark of a call on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.data.conversation import CALLS, THOUGHT_FIELDS, Message

__all__ = ["Answer", "AnswerStream", "Marks"]

_BEGINS = re.compile(r"(?:^|(?<=\s)|(?=<))\S")


@dataclass(frozen=True)
class Answer:
    """An answer, or what has come of one: `text` counts, `thought` led to it, `calls` are functions with arguments."""

    text: str
    thought: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()

    @property
    def judged(self) -> str:
        """Text and calls, for comparing answers; calls as JSON, a line each."""
        calls = [json.dumps(call, ensure_ascii=False, sort_keys=True) for call in self.calls]
        return "\n".join(part for part in (self.text, *calls) if part)

    def message(self) -> Message:
        """As a turn of the conversation that goes on."""
        turn: Message = {"role": "assistant", "content": self.text}
        if self.thought:
            turn[THOUGHT_FIELDS[0]] = self.thought
        if self.calls:
            turn[CALLS] = [{"type": "function", "function": dict(call)} for call in self.calls]
        return turn


class Marks:
    """Words that part an answer, such as `</think>`; a mark may begin at any tag or word of it."""

    def __init__(self, marks: Iterable[str]) -> None:
        found = {_bare(mark[each.start() :]) for mark in marks for each in _BEGINS.finditer(mark)}
        self._marks = tuple(sorted(found))
        self._begins = frozenset(mark[0] for mark in found)
        self._most = 2 * max(map(len, found), default=0)

    def held(self, text: str) -> int:
        """How many characters at the end of `text` are a mark or the beginning of one, white space apart."""
        for at in range(max(0, len(text) - self._most), len(text)):
            if text[at] in self._begins:
                tail = _bare(text[at:])
                if any(mark.startswith(tail) for mark in self._marks):
                    return len(text) - at
        return 0


class AnswerStream:
    """One answer as it comes.

    Args:
        begun: thought, text and calls of what is there, or of the whole where it has ended, as far as they are sure.
        read: the whole answer, read at once.
    """

    def __init__(self, begun: Callable[[str, bool], Answer], read: Callable[[str], Answer]) -> None:
        self._begun, self._read = begun, read
        self._written = ""
        self._sent = Answer("")

    def feed(self, text: str) -> Answer:
        """What these further words add."""
        self._written += text
        return self._more(self._begun(self._written, False))

    def end(self) -> Answer:
        """What was held back, and the calls."""
        whole = self._read(self._written)
        if not (whole.thought.startswith(self._sent.thought) and whole.text.startswith(self._sent.text)):
            whole = self._begun(self._written, True)
        return self._more(whole)

    def _more(self, now: Answer) -> Answer:
        sent = self._sent
        thought = now.thought if now.thought.startswith(sent.thought) else sent.thought
        text = now.text if now.text.startswith(sent.text) else sent.text
        self._sent = Answer(text, thought)
        return Answer(text[len(sent.text) :], thought[len(sent.thought) :], now.calls)


def _bare(text: str) -> str:
    return "".join(text.split())
