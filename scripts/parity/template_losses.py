"""What a template leaves out of a row, or writes otherwise, seen by the row's words in the text that it renders.

Templates drop roles, thoughts and calls that they do not know without raising; only the text shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.parity.template_renderer import thought_of

__all__ = ["Need", "losses"]

Message = dict[str, Any]


@dataclass(frozen=True)
class Need:
    """A thing of which the user has to be told: any notice with one of `words` (a pattern) tells it."""

    what: str
    words: str


_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_SPACE = Need("white space", "white|space|trim|strip|blank|line|rewr|writes|differ|otherwise")
_TAKEN = Need("words taken for a thought", "think|thought|reason|rewr|writes|differ|otherwise")
_ROLE_WORDS = {
    "system": "system",
    "developer": "developer",
    "user": "user|turn|content",
    "assistant": "assistant|answer|turn|content",
    "tool": "tool|result",
}
# A value printed as it is: None, a dictionary as Python writes it, a content's parts. In a call also JSON inside JSON.
_PRINTED = re.compile(r"\bNone\b|\{'|\[\{\"type\": \"text\"")
_TWICE = re.compile(r"\{\\+\"")


def losses(prompt: str, target: str, messages: Sequence[Message], tools: Any) -> tuple[list[Need], list[Need]]:
    """What is lost and what only rewritten, of `messages` (the last one is the answer) in `prompt` and `target`."""
    *history, answer = messages
    lost = [need for turn in history for need in _history(prompt, turn)]
    lost += _unless(_words(tools_names(tools)), prompt, Need("the tools", "tool"))
    lost += _answer(target, answer)
    if _PRINTED.search(prompt + target) and not _PRINTED.search(str([_text(turn) for turn in messages])):
        lost.append(Need("a value printed as it is", "content|argument|call|null|text|part"))
    if _called(answer) and _TWICE.search(target):
        lost.append(Need("arguments quoted twice", "argument|call"))
    rewritten = []
    said = _text(answer)
    if not lost and said not in target and not _THOUGHT.match(said):
        rewritten.append(_SPACE if "</think>" not in said else _TAKEN)
    return lost, rewritten


def tools_names(tools: Any) -> str:
    """The names of the functions of `tools`, in one string."""
    return " ".join(tool["function"]["name"] for tool in tools or [])


def _history(prompt: str, turn: Message) -> Iterator[Need]:
    role = turn["role"]
    said = _THOUGHT.sub("", _text(turn)) if role == "assistant" else _text(turn)
    yield from _unless(_words(said), prompt, Need(f"words of a {role} turn", _ROLE_WORDS[role]))
    yield from _unless(_called(turn), prompt, Need("an earlier call", "call|argument"))


def _answer(target: str, turn: Message) -> Iterator[Need]:
    inline = _THOUGHT.match(_text(turn))
    thought = thought_of(turn) + (inline[1] if inline else "")
    yield from _unless(_words(thought), target, Need("the thought", "think|thought|reason"))
    yield from _unless(
        _words(_THOUGHT.sub("", _text(turn))), target, Need("words of the answer", "content|answer|words")
    )
    yield from _unless(_called(turn), target, Need("the call", "call|argument"))


def _unless(words: list[str], text: str, need: Need) -> Iterator[Need]:
    if not all(word in text for word in words):
        yield need


def _words(text: str) -> list[str]:
    return re.findall(r"\w{2,}", text)


def _called(turn: Message) -> list[str]:
    calls = [call["function"] for call in turn.get("tool_calls") or []]
    return [word for call in calls for word in (call["name"], *_words(_leaves(call["arguments"])))]


def _leaves(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_leaves(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_leaves, value))
    return "" if isinstance(value, bool) or value is None else str(value)


def _text(turn: Message) -> str:
    content = turn.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content if isinstance(content, str) else ""
