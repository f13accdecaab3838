"""A chat template as inference renders it, with the habits of its answers' ends, and a row's equal forms.

transformers' own function renders; what it does not tell, how an answer ends, is read off probes.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest import mock

from jinja2 import Environment, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from transformers.utils import chat_template_utils

__all__ = ["TODAY", "WORD", "Message", "NoForm", "Renderer", "forms", "frozen_day", "thought_of"]

Message = dict[str, Any]
WORD = "ZEPHYR"
"""An answer's, or a thought's, single word in a probe."""
TODAY = datetime.date(2025, 3, 14)


class _Generation(Extension):
    """The mark around what an assistant writes, which transformers adds to Jinja."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Frozen(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> _Frozen:
        return cls(TODAY.year, TODAY.month, TODAY.day, 9, 30)


def frozen_day() -> AbstractContextManager[object]:
    """Within it, templates that ask for the time are told that it is `TODAY`."""
    return mock.patch.object(chat_template_utils, "datetime", _Frozen)


class NoForm(Exception):
    """The template has no form for this row."""


@dataclass(frozen=True)
class Renderer:
    """A template as inference renders it, with the habits of its answers' ends."""

    tokenizer: Any
    template: str
    stops: tuple[str, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def render(self, messages: Sequence[Message], tools: Any, *, prompt: bool, **kwargs: Any) -> str:
        """The text of a conversation, with or without a generation prompt, on a fixed day.

        Raises:
            NoForm: the template refuses it or breaks.
        """
        try:
            with frozen_day():
                # What apply_chat_template renders with, but it also takes a conversation that begins with an answer.
                texts, _ = chat_template_utils.render_jinja_template(
                    conversations=[copy.deepcopy(list(messages))],
                    tools=copy.deepcopy(tools),
                    chat_template=self.template,
                    add_generation_prompt=prompt,
                    **{**self.tokenizer.special_tokens_map, **self.kwargs, **kwargs},
                )
                return str(texts[0])
        except Exception as error:  # whatever a template does wrong is its refusal
            raise NoForm(f"the template refuses: {' '.join(str(error).split())[:120]}") from None

    def ids(self, text: str) -> tuple[int, ...]:
        """The tokens of `text`, with none put before it."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def specials(self) -> re.Pattern[str]:
        """All special tokens of the tokenizer, the longest first."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        every = sorted({*added, *self.stops}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, every)))

    @cached_property
    def options(self) -> frozenset[str]:
        """The variables that the template reads from outside: those that it never sets, or gives a default first."""
        tree = Environment(extensions=[_Generation, loopcontrols]).parse(self.template)
        return frozenset(filter(self._from_outside, meta.find_undeclared_variables(tree)))

    def _from_outside(self, name: str) -> bool:
        first = re.search(rf"\bset\s+{name}\s*=\s*(\w*)", self.template)
        return first is None or first[1] == name

    @cached_property
    def takes_text(self) -> bool:
        """Whether contents may be text; some templates only know lists of parts."""
        try:
            return WORD in self.render([_ASKED, _ANSWER], None, prompt=False)
        except NoForm:
            return False

    @cached_property
    def closers(self) -> tuple[str, ...]:
        """The special tokens with which the template closes a plain answer, in order; none where there are none."""
        for form in forms([_ASKED, _ANSWER]):
            try:
                _, seen, after = self.render(form, None, prompt=False).partition(WORD)
            except NoForm:
                continue
            if seen:
                return tuple(self.specials.findall(after))
        return ()

    @cached_property
    def stops_between(self) -> bool:
        """Whether a stop token stands between an answer and the question after it, too."""
        for form in forms([_ASKED, _ANSWER, {**_ASKED, "content": "quixotic"}]):
            try:
                _, seen, after = self.render(form, None, prompt=False).partition(WORD)
            except NoForm:
                continue
            if seen and "quixotic" in after:
                return any(stop in after.partition("quixotic")[0] for stop in self.stops)
        return True

    def header(self, *, calls: bool) -> str | None:
        """The special token with which the turn after an answer begins, after calls the one after them."""
        answer, reply = (_CALLING, _RESULT) if calls else (_ANSWER, _ASKED)
        for form in forms([_ASKED, answer, reply]):
            try:
                text = self.render(form, _TOOLS if calls else None, prompt=False)
                before = self.render(form[:-1], _TOOLS if calls else None, prompt=False)
            except NoForm:
                continue
            # Earlier text may be written otherwise once a turn follows, so the answer's own end is looked for.
            start = before.rfind("probe" if calls else WORD)
            end = before[start:] if start >= 0 else None
            found = end and end in text and self.specials.match(text, text.rindex(end) + len(end))
            if found:
                return str(found[0])
        return None

    def ends(self, rest: str, *, calls: bool) -> list[str]:
        """`rest`, an answer as the template renders it, through the token that ends it; the choices there are.

        Raises:
            NoForm: nothing ends it.
        """
        listed = [m.end() for m in self.specials.finditer(rest) if m[0] in self.stops]
        closing = [m.end() for m in self.specials.finditer(rest) if m[0] in self.closers]
        if listed:
            # A closer that is in no list ends a turn too, where the listed one stands after the whole text only.
            early = [end for end in closing[:1] if end < listed[0] and not self.stops_between]
            return [rest[: listed[0]], *(rest[:end] for end in early)]
        if closing:
            return [rest[:end] for end in dict.fromkeys((closing[0], closing[-1]))]
        last = [m.end() for m in self.specials.finditer(rest)][-1:]
        if calls and last and self.closers and not rest[last[0] :].strip():
            return [rest[: last[0]]]  # answers have an end of their own, and calls another one
        if header := self.header(calls=calls):
            return [rest + header]
        if calls and last:
            return [rest[: last[0]]]
        raise NoForm("nothing ends an answer")


_ASKED: Message = {"role": "user", "content": "hello"}
_ANSWER: Message = {"role": "assistant", "content": WORD}
_CALLING: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "aB3dE6gH9", "type": "function", "function": {"name": "probe", "arguments": {"x": "y"}}}],
}
_RESULT: Message = {"role": "tool", "tool_call_id": "aB3dE6gH9", "name": "probe", "content": "found"}
_TOOLS = [{"type": "function", "function": {"name": "probe", "description": "d", "parameters": {"type": "object",
          "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}}}]  # fmt: skip


_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def thought_of(turn: Message) -> str:
    """The thought of a turn that has a field for it."""
    return str(next((turn[name] for name in _THOUGHTS if turn.get(name)), ""))


def forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The conversation in forms that say the same: arguments as an object or text, contents of each accepted kind.

    Thoughts stand under the names that templates read them by.
    """
    names = _THOUGHTS if any(turn.get(_THOUGHTS[0]) for turn in messages) else _THOUGHTS[:1]
    for name, parts, text, content in itertools.product(
        names, (False, True), (False, True), ("given", "", None, "absent")
    ):
        named = [{name if key == _THOUGHTS[0] else key: value for key, value in turn.items()} for turn in messages]
        yield [_formed(turn, parts=parts, text=text, content=content) for turn in named]


def _formed(turn: Message, *, parts: bool, text: bool, content: str | None) -> Message:
    turn = dict(turn)
    given = turn.get("content")
    if isinstance(given, list) and not parts:
        turn["content"] = "".join(part["text"] for part in given)
    elif isinstance(given, str) and given and parts:
        turn["content"] = [{"type": "text", "text": given}]
    if turn.get("tool_calls"):
        turn["tool_calls"] = [_called(call, text=text) for call in turn["tool_calls"]]
        if not given and content == "absent":
            turn.pop("content", None)
        elif not given and content != "given":
            turn["content"] = content
    return turn


def _called(call: Message, *, text: bool) -> Message:
    arguments = call["function"]["arguments"]
    if text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not text and isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}
