"""An answer read while it is being written: what comes of its thought and text, and its calls once it has ended.

The reader of whole answers reads what is there again and again, and what it adds is sent. An end that may become a
mark (`</thi`, `<tool_`) is held back until it is one or none, and so is all from the first mark of a call on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AnswerStream", "Marks", "Piece"]

_BEGINS = re.compile(r"(?:^|(?<=\s)|(?=<))\S")


@dataclass(frozen=True)
class Piece:
    """What an answer has more than before; `calls` come with its end."""

    thought: str = ""
    text: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()


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

    def __init__(self, begun: Callable[[str, bool], Piece], read: Callable[[str], Piece]) -> None:
        self._begun, self._read = begun, read
        self._written = ""
        self._sent = Piece()

    def feed(self, text: str) -> Piece:
        """What these further words add."""
        self._written += text
        return self._more(self._begun(self._written, False))

    def end(self) -> Piece:
        """What was held back, and the calls."""
        whole = self._read(self._written)
        if not (whole.thought.startswith(self._sent.thought) and whole.text.startswith(self._sent.text)):
            whole = self._begun(self._written, True)
        return self._more(whole)

    def _more(self, now: Piece) -> Piece:
        sent = self._sent
        thought = now.thought if now.thought.startswith(sent.thought) else sent.thought
        text = now.text if now.text.startswith(sent.text) else sent.text
        self._sent = Piece(thought, text)
        return Piece(thought[len(sent.thought) :], text[len(sent.text) :], now.calls)


def _bare(text: str) -> str:
    return "".join(text.split())
