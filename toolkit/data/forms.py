"""The form of a conversation that a chat template takes: valid data is written in several ways, and templates read one.

Arguments of a call as an object or as JSON text, no content beside a call as null or as "", parts or plain text, call
ids, names of roles and of the thought's key: each way is tried on a conversation of the same shape, and the first one
in which nothing is lost is kept, once a shape. Keys that a template does not read are found the same way: left out or
saying something else, they change nothing it writes. transformers hands a template whatever it is given.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.data.conversation import CALLS, FLAGS, THOUGHT_FIELDS, Message, text_of, thought_of, without_thought
from toolkit.data.problems import InvalidRow
from toolkit.data.said import Probe, shape
from toolkit.data.template import ChatTemplate, Options

__all__ = ["Form", "Forms", "UnreadKey", "unread_keys"]

_JUDGED = {"role", "content", CALLS, *THOUGHT_FIELDS, *FLAGS}
"""What is read here, or refused where a template leaves it out."""
_OTHER = "onecardprobeother"

Tools = list[dict[str, Any]] | None
Way = Callable[[Message], Message]

_OTHER_ROLES = {"developer": "system", "environment": "tool", "function": "tool"}
_TWICE = re.compile(r"</think>\s*<think>")
_UNREADABLE = 1 << 20
"""More than can be lost: the template refuses the conversation."""


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


@dataclass(frozen=True)
class Form:
    """Ways to rewrite each message, how tools are written, and what is lost all the same: turns and kinds.

    `unread` are the keys of messages that change nothing, each with the words that name it.
    """

    ways: tuple[Way, ...]
    bare_tools: bool | None
    lost: tuple[tuple[int, str], ...]
    tells_tools: bool = True
    unread: Mapping[UnreadKey, str] = field(default_factory=dict)

    def notices(self, messages: Sequence[Message]) -> list[str]:
        """What a person should know of this form of these messages."""
        is_inline = any(thought_of(m) and not any(m.get(key) for key in THOUGHT_FIELDS) for m in messages)
        told = (way for way in self.ways if way in _NOTICES)
        unread = (words for key, words in self.unread.items() if key.stands_in(messages))
        return [
            *[_NOTICES[way] for way in told if is_inline or way not in (_thought_in_fields, _thought_as_reasoning)],
            *[f"message key {words}: neither trained nor read by the chat template" for words in unread],
        ]

    def messages(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages in this form."""
        for way in self.ways:
            messages = [way(message) for message in messages]
        return tuple(messages)

    def tools(self, tools: Tools) -> Tools:
        """The tools in this form: as they are, or all with or without their wrapper."""
        if tools is None or self.bare_tools is None:
            return tools
        return [_bare(tool) if self.bare_tools else _wrapped(tool) for tool in tools]


class Forms:
    """The form for each shape of conversation that was seen."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._known: dict[Any, Form] = {}

    def of(self, messages: Sequence[Message], tools: Tools, options: Options) -> Form:
        """The form in which the template takes a conversation like this one."""
        key = (shape(messages, tools), json.dumps(options, sort_keys=True, default=str) if options else "")
        if key not in self._known:
            self._known[key] = self._best(messages, tools, options)
        return self._known[key]

    def _best(self, messages: Sequence[Message], tools: Tools, options: Options) -> Form:
        words = Probe(messages, tools)
        best, fewest = Form((), None, ()), _UNREADABLE + 1
        knows_inline = "</think>" in self._template.text(tools)
        for form in _candidates(messages, tools, knows_inline=knows_inline):
            lost, tells = self._lost(words, form, options), self._tells_tools(words, form, options)
            # Tools are written otherwise so that they are told, not so that they are passed over.
            unreadable = lost is None or (form.bare_tools is not None and not tells)
            count = _UNREADABLE if unreadable or lost is None else len(lost)
            if count < fewest:
                best, fewest = Form(form.ways, form.bare_tools, tuple(lost or ()), tells), count
            if count == 0:
                break
        return replace(best, unread=self._unread(words, best, options))

    def _unread(self, words: Probe, form: Form, options: Options) -> Mapping[UnreadKey, str]:
        """Keys that change nothing; those that the template names elsewhere with the turns they stand in."""
        tools, text = form.tools(words.tools), self._template.text(words.tools)

        def write(messages: Sequence[Message]) -> str:
            return self._template.try_render(form.messages(messages), tools, options=options)

        found = unread_keys(write, words.messages)
        return {each: repr(each.key) + (f" of {each.role} turns" if each.key in text else "") for each in found}

    def _lost(self, words: Probe, form: Form, options: Options) -> list[tuple[int, str]] | None:
        """What is not in the rendering of the words; None where the template refuses them."""
        messages, tools = form.messages(words.messages), form.tools(words.tools)
        thinkers = [turn for turn, message in enumerate(words.messages) if thought_of(message)]
        try:
            whole = self._template.render(messages, tools, options=options)
            # An earlier turn's thought is what the model writes there, though later renderings may leave it out.
            each = {turn: self._template.render(messages[: turn + 1], tools, options=options) for turn in thinkers}
        except InvalidRow:
            return None
        lost = [place for place in words.lost(whole) if place[1] != "thought"]
        lost += [(turn, "thought") for turn, text in each.items() if (turn, "thought") in words.lost(text)]
        # A thought in the content behind an empty one of the template's own is not where it reads one.
        lost += [(turn, "thought") for turn, text in each.items() if _TWICE.search(text)]
        lost += [(turn, "call") for turn, shown in _shown_by_python(messages) if shown in whole]
        return lost + [(turn, "content") for turn in self._none_written(messages, tools, options, whole)]

    def _tells_tools(self, words: Probe, form: Form, options: Options) -> bool:
        """Whether every tool is described, or named before it is called."""
        if not words.tools:
            return True
        asked = next((turn for turn, said in enumerate(words.messages) if said["role"] == "assistant"), 0)
        try:
            text = self._template.render(
                form.messages(words.messages[:asked]), form.tools(words.tools), generation_prompt=True, options=options
            )
        except InvalidRow:
            return False
        named = zip(words.told_tools, (tool.get("function", tool).get("name") for tool in words.tools), strict=False)
        return all(told in text or str(name) in text for told, name in named)

    def _none_written(self, messages: Sequence[Message], tools: Tools, options: Options, whole: str) -> list[int]:
        """Turns without content for which the template writes the word None."""
        bare = [turn for turn, message in enumerate(messages) if message.get("content", "") is None]
        if not bare or "None" not in whole:
            return []
        try:
            other = self._template.render([_empty_content(message) for message in messages], tools, options=options)
        except InvalidRow:
            return []
        return bare if whole.count("None") > other.count("None") else []


def _shown_by_python(messages: Sequence[Message]) -> Iterator[tuple[int, str]]:
    """How Python or JSON would print what a template should have written in its own way."""
    for turn, message in enumerate(messages):
        if isinstance(parts := message.get("content"), list):
            yield from ((turn, shown) for shown in (str(parts), json.dumps(parts), json.dumps(parts, indent=4)))
        for call in message.get(CALLS) or ():
            arguments = call.get("function", call).get("arguments")
            if isinstance(arguments, Mapping) and arguments and str(arguments) != json.dumps(arguments):
                yield turn, str(dict(arguments))


def _candidates(messages: Sequence[Message], tools: Tools, *, knows_inline: bool) -> list[Form]:
    """Every combination of ways that concern this conversation, those with the fewest changes first.

    A thought goes into the content only where the template knows thoughts there: no form of it is made up.
    """
    calls = [call for message in messages for call in message.get(CALLS) or ()]
    choices: list[tuple[Way | None, ...]] = []
    if calls:
        choices += [(None, _text_arguments), (_without_null, None, _empty_content, _no_content), (None, _with_ids)]
    if thinkers := [message for message in messages if thought_of(message)]:
        in_fields = (_thought_in_fields, _thought_as_reasoning)
        is_inline = not any(message.get(key) for message in thinkers for key in THOUGHT_FIELDS)
        # A template that does not know thoughts in the content would write their tags out as words.
        own_first = knows_inline or not is_inline
        choices += [
            (None, *in_fields, *([_thought_inline] if knows_inline else [])) if own_first else (*in_fields, None)
        ]
    lists = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    if lists and all(len(parts) == 1 for parts in lists):  # then the text is the same either way
        choices += [(_plain_content, None, _parts)]
    else:
        choices += [(None, _plain_content, _parts) if lists else (None, _parts)]
    if any(message["role"] in _OTHER_ROLES for message in messages):
        choices += [(None, _usual_role)]
    # The first of each is what is liked best; the others are changes.
    numbered = itertools.product(*(list(enumerate(each)) for each in choices))
    wrappers = enumerate((None, False, True) if tools else (None,))
    pairs = [
        (
            sum(place > 0 for place, _ in (*picked, wrapper)),
            Form(tuple(way for _, way in picked if way), wrapper[1], ()),
        )
        for picked, wrapper in itertools.product(numbered, wrappers)
    ]
    return [form for _, form in sorted(pairs, key=lambda pair: pair[0])]


def _text_arguments(message: Message) -> Message:
    return _with_calls(message, lambda call: {**call, "arguments": _as_text(call.get("arguments"))})


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_calls(message: Message, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Message:
    if not message.get(CALLS):
        return message
    calls = [{**c, "function": change(c["function"])} if "function" in c else change(c) for c in message[CALLS]]
    return {**message, CALLS: calls}


def _empty_content(message: Message) -> Message:
    return {**message, "content": ""} if message.get(CALLS) and not message.get("content") else message


def _no_content(message: Message) -> Message:
    return {**message, "content": None} if message.get(CALLS) and not message.get("content") else message


def _without_null(message: Message) -> Message:
    """As transformers gives messages to templates; some of these ask whether the content is null, though."""
    if "content" not in message or message["content"] is not None:
        return message
    return {key: value for key, value in message.items() if key != "content"}


def _with_ids(message: Message) -> Message:
    """Ids of nine letters and figures, the strictest form, that depend on the old id or the call alone."""
    if message["role"] == "tool":
        return {**message, "tool_call_id": _nine(message.get("tool_call_id") or "0")}
    if not message.get(CALLS):
        return message
    return {**message, CALLS: [{**c, "id": _nine(c.get("id") or i)} for i, c in enumerate(message[CALLS])]}


def _nine(old: Any) -> str:
    kept = "".join(char for char in str(old) if char.isascii() and char.isalnum())
    return kept[-9:].rjust(9, "0")


def _plain_content(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": text_of(content)} if isinstance(content, list) else message


def _parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _usual_role(message: Message) -> Message:
    return {**message, "role": _OTHER_ROLES.get(message["role"], message["role"])}


def _thought_in_fields(message: Message) -> Message:
    return _rethought(message, lambda thought: {THOUGHT_FIELDS[0]: thought})


def _thought_as_reasoning(message: Message) -> Message:
    return _rethought(message, lambda thought: dict.fromkeys(THOUGHT_FIELDS, thought))


def _thought_inline(message: Message) -> Message:
    thought, bare = thought_of(message), without_thought(message)
    if not thought or isinstance(bare.get("content"), list):
        return message
    return {**bare, "content": f"<think>\n{thought.strip()}\n</think>\n\n{bare.get('content') or ''}"}


def _rethought(message: Message, keys: Callable[[str], dict[str, str]]) -> Message:
    thought = thought_of(message)
    return {**without_thought(message), **keys(thought)} if thought else message


def _bare(tool: dict[str, Any]) -> dict[str, Any]:
    inner = tool.get("function")
    return inner if isinstance(inner, dict) else tool


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    return tool if "function" in tool else {"type": "function", "function": tool}


_MOVED = "a thought in <think>…</think> is given to the chat template as reasoning_content, which it reads"
_NOTICES: Mapping[Way, str] = {
    **dict.fromkeys((_thought_in_fields, _thought_as_reasoning), _MOVED),
    _thought_inline: "a thought is written into the content as <think>…</think>, where the chat template reads it",
    _with_ids: "tool call ids are rewritten as nine letters and digits, as the chat template requires",
    _usual_role: "the roles developer, environment and function are given to the chat template as system and tool",
}
