"""How a template writes tool calls, learnt from its rendering of unique words, and calls read back from a text.

Arguments stand as JSON or as keys and values between fixed words; both are read. What cannot be read stays text.
transformers reads calls where a tokenizer brings a description of its answers, which most do not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

from toolkit.data.conversation import CALLS, Message

__all__ = ["CallForm", "call_turn", "learn_calls"]

_ID = "onecardid"  # nine letters, the strictest form
_NAMES = ("onecardnameone", "onecardnametwo")
_KEYS, _VALUES = ("onecardkeyone", "onecardkeytwo"), ("onecardvalueone", "onecardvaluetwo")


@dataclass(frozen=True)
class CallForm:
    """The words around one call: before its name (`opening` for the first call), before its arguments, after them.

    `before_value` and `between` part keys, values and arguments; where `is_json`, arguments are one JSON object.
    `empty` are the words after the name of a call without arguments, where these are otherwise; else nothing.
    """

    opening: str
    before_name: str
    before_arguments: str
    before_value: str
    between: str
    after: str
    is_json: bool
    empty: str = ""

    def read(self, text: str) -> tuple[str, tuple[Mapping[str, Any], ...]]:
        """The text before the calls, and the calls; all of it and none where there are none."""
        found = list(self._found(text))
        if not found:
            return text, ()
        return text[: self._opened(text, found[0][0])], tuple(call for _, call in found)

    def before(self, text: str) -> str:
        """The text before what may become calls, of an answer that goes on."""
        mark = next(filter(str.strip, (self.before_name.partition(_ID)[0], *self.opening.split()[-1:])), "")
        first = re.compile(_pattern(mark)).search(text)
        return text[: self._opened(text, first.start())] if first else text

    @property
    def marks(self) -> tuple[str, ...]:
        """What may stand before a call."""
        return tuple(words.partition(_ID)[0] for words in (self.opening, self.before_name))

    def _opened(self, text: str, start: int) -> int:
        """Where the words before all calls begin, the first of which begins at `start`."""
        opened = text.rfind(self.opening.strip(), 0, start + len(self.opening)) if self.opening.strip() else -1
        return opened if 0 <= opened < start else start

    def _found(self, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Where each call begins, and the call."""
        name = r"(?P<name>[^\s\"'(){}\[\]<>,=|]+?)"
        rest = _pattern(self.before_arguments, name="(?P=name)") + (r"(?=\{)" if self.is_json else "")
        if self.empty:
            rest = f"(?:(?P<empty>{_pattern(self.empty, name='(?P=name)')})|{rest})"
        head = re.compile(_pattern(self.before_name) + name + rest, re.DOTALL)
        at = self._first(text)
        while match := head.search(text, at):
            start = match.end()
            arguments, at = ({}, start) if match.groupdict().get("empty") else self._arguments(text, start)
            if arguments is None:
                return
            yield match.start(), {"name": match["name"], "arguments": arguments}

    def _first(self, text: str) -> int:
        """Where the first call can begin: a name with no words of its own before it follows what opens all calls."""
        opens = self.opening.split()[-1:]
        if self.before_name.strip() or not opens:
            return 0
        return at + len(opens[0]) if (at := text.find(opens[0])) >= 0 else len(text)

    def _arguments(self, text: str, start: int) -> tuple[dict[str, Any] | None, int]:
        """The arguments that begin at a place, and where they end."""
        if self.is_json:
            start += len(text[start:]) - len(text[start:].lstrip())
            try:
                value, end = json.JSONDecoder().raw_decode(text, start)
            except ValueError:
                return None, start
            return (value, end) if isinstance(value, dict) else (None, start)
        closing = re.compile(_pattern(self.after)).search(text, start)
        if closing is None:
            return None, start
        parts = re.split(_pattern(self.between), text[start : closing.start()])
        pairs = [re.split(_pattern(self.before_value), part, maxsplit=1) for part in parts]
        if any(len(pair) != 2 for pair in pairs):
            return None, start
        return {key.strip(): _value(value) for key, value in pairs}, closing.end()


def learn_calls(write: Callable[[Message], str]) -> CallForm | None:
    """How a template writes calls, None where it writes none that can be read.

    Args:
        write: what the template has for an assistant's turn, from its generation prompt on.
    """
    one = write(call_turn())
    words = "(.*?)".join(map(re.escape, (_NAMES[0], _KEYS[0], _VALUES[0], _KEYS[1], _VALUES[1])))
    found = re.search(rf"^(.*?){words}(.*)$", one, re.DOTALL)
    if not found or found[3] != found[5]:
        return None
    opening, lead, before_value, between, after = found[1], found[2], found[3], found[4], found[6]
    before_name = opening
    two = write(_turn({name: {key: value} for name, key, value in zip(_NAMES, _KEYS, _VALUES, strict=True)}))
    if both := re.search(rf"{_VALUES[0]}(.*?){_NAMES[1]}", two, re.DOTALL):
        after = _whole_tags(commonprefix([after, both[1]]))  # noqa: RUF071 - characters are meant
        before_name = re.sub(r"^[^<]*>", "", _common_end(opening, both[1]))
    brace = lead.rfind("{")
    is_json = brace >= 0 and lead[brace:].strip() in ('{"', "{") and before_value.strip() == '": "'
    before_arguments = lead[:brace] if is_json else lead
    form = CallForm(opening, before_name, before_arguments, before_value, between, after, is_json)
    return replace(form, empty=_learn_empty(write, form))


def _learn_empty(write: Callable[[Message], str], form: CallForm) -> str:
    """What follows the name of a call without arguments; nothing where the form reads such a call as it is."""
    one = write(_turn({_NAMES[0]: {}}))
    if [call["arguments"] for call in form.read(one)[1]] == [{}]:
        return ""
    both = re.search(rf"{_NAMES[0]}(.*){_NAMES[1]}", write(_turn({name: {} for name in _NAMES})), re.DOTALL)
    rest = one.partition(_NAMES[0])[2]
    return _whole_tags(commonprefix([rest, both[1]])).strip() if both else ""  # noqa: RUF071 - characters are meant


def call_turn() -> Message:
    """An assistant's turn with one call of unique words."""
    return _turn({_NAMES[0]: dict(zip(_KEYS, _VALUES, strict=True))})


def _turn(calls: Mapping[str, Mapping[str, str]]) -> Message:
    functions = [{"name": name, "arguments": dict(arguments)} for name, arguments in calls.items()]
    written = [{"id": _ID, "type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": "", CALLS: written}


def _whole_tags(text: str) -> str:
    """The text without a tag at its end that is not whole: two that begin alike are not the same."""
    return re.sub(r"<[^>]*$", "", text)


def _common_end(one: str, other: str) -> str:
    return commonprefix([one[::-1], other[::-1]])[::-1]  # noqa: RUF071


def _pattern(literal: str, name: str = "") -> str:
    """A pattern of these words: white space as it comes, between tags perhaps none, any id, the call's name again."""
    tags = re.split(r"(?<=>)\s+(?=<)", literal)
    words = r"\s*".join(r"\s+".join(map(re.escape, tag.split())) for tag in tags).replace(_ID, r"[\w.-]+")
    return r"\s*" + words.replace(_NAMES[0], name or r"\S+?") + r"\s*"


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()
