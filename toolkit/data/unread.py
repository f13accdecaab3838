"""Keys of messages that a template does not read: left out or saying something else, they change nothing it writes.

A search in the template's text would find `name` in nearly all of them: tools have names, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from toolkit.data.conversation import CALLS, FLAGS, THOUGHT_FIELDS, Message

__all__ = ["UnreadKey", "unread_keys"]

_JUDGED = {"role", "content", CALLS, *THOUGHT_FIELDS, *FLAGS}
"""What is read here, or refused where a template leaves it out."""
_OTHER = "onecardprobeother"


@dataclass(frozen=True)
class UnreadKey:
    """A key of the messages of one role."""

    role: str
    key: str

    def stands_in(self, messages: Sequence[Message]) -> bool:
        """Whether a message says something under it."""
        return any(each["role"] == self.role and each.get(self.key) not in (None, "", [], {}) for each in messages)


def unread_keys(write: Callable[[Sequence[Message]], str], messages: Sequence[Message]) -> Iterator[UnreadKey]:
    """The keys of `messages` that change nothing.

    Args:
        write: what the template has for a conversation; nothing where it refuses it.
    """
    whole = write(messages)
    pairs = sorted({(message["role"], key) for message in messages for key in message.keys() - _JUDGED})
    for role, key in pairs if whole else ():
        others: tuple[Mapping[str, str], ...] = ({}, {key: _OTHER})
        if all(write([_said(message, role, key, other) for message in messages]) == whole for other in others):
            yield UnreadKey(role, key)


def _said(message: Message, role: str, key: str, other: Mapping[str, str]) -> Message:
    if message["role"] != role or key not in message:
        return message
    return {**{name: value for name, value in message.items() if name != key}, **other}
