"""What a model wrote, read: its thought, its text and its calls, as the chat template would be given them again.

Where the tokenizer says how its answers are read (transformers' `response_template`, and TRL's for published
templates), that is done. Elsewhere the template's own rendering of unique words says what stands around each part;
calls count as read only if rendering them again gives what was written.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolkit.data.conversation import CALLS, THOUGHT_FIELDS, Message
from toolkit.data.problems import InvalidRow
from toolkit.data.turns import TurnReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "AnswerReader"]

_THOUGHT, _CONTENT = "onecardprobethought", "onecardprobecontent"
_NAME, _KEYS, _VALUES = "onecardprobename", ("onecardkeyone", "onecardkeytwo"), ("onecardvalueone", "onecardvaluetwo")
_ASKED: Message = {"role": "user", "content": "onecardprobeasked"}


@dataclass(frozen=True)
class Answer:
    """One answer: `text` is what counts, `thought` what led to it, `calls` are functions with arguments."""

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


@dataclass(frozen=True)
class _Around:
    """What a template writes around the parts of an answer; empty where it does not write such a part."""

    before_thought: str = ""
    after_thought: str = ""
    before_text: str = ""
    call: tuple[str, ...] = field(default=())
    """Before the name, before the first key, before a value, between two arguments, after the last value."""


class AnswerReader:
    """Reads answers under one tokenizer and template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reader: TurnReader) -> None:
        self._tokenizer: Any = tokenizer
        self._reader = reader
        self._schema = _schema(tokenizer, reader.template.text())
        self._around = self._look()

    def read(self, ids: Sequence[int], prompt_ids: Sequence[int]) -> Answer:
        """The parts of what was written after a prompt."""
        prompt, text = self._decode(prompt_ids), self._decode(ids)
        if self._schema is not None and (found := self._by_schema(text, prompt)):
            return found
        bare = self._without_end(text)
        thought, rest = self._thought(bare, prompt)
        plain, calls = self._calls(rest)
        return Answer(self._plain(plain), self._plain(thought), calls)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _plain(self, text: str) -> str:
        """Without special tokens."""
        return self._reader.stops.special.sub("", text).strip()

    def _without_end(self, text: str) -> str:
        stop = self._reader.stops.first(text)
        return text.partition(stop)[0] if stop else text

    def _by_schema(self, text: str, prompt: str) -> Answer | None:
        try:
            found = self._tokenizer.parse_response(text, schema=self._schema, prefix=prompt)
        except (ValueError, TypeError, KeyError, IndexError):  # an answer that is not in the form
            return None
        if not isinstance(found, Mapping) or not isinstance(found.get("content") or "", str):
            return None
        calls = [call.get("function", call) for call in found.get(CALLS) or () if isinstance(call, Mapping)]
        thought = next((found[key] for key in THOUGHT_FIELDS if isinstance(found.get(key), str)), "")
        kept = tuple({"name": call.get("name"), "arguments": call.get("arguments") or {}} for call in calls)
        content = found.get("content") or ""
        return Answer(self._plain(content), thought.strip(), kept) if content or thought or kept else None

    def _thought(self, text: str, prompt: str) -> tuple[str, str]:
        """The thought and what follows it."""
        around = self._around
        closing = around.after_thought.strip()
        if closing:
            thought, found, rest = text.partition(closing)
            opening = around.before_thought.strip()
            opened = bool(opening) and prompt.rstrip().endswith(opening)
            begun = opened or (bool(opening) and thought.lstrip().startswith(opening))
            if found and (begun or not opening or not self._plain(thought)):
                return thought.removeprefix(" ").partition(opening)[2] if begun and not opened else thought, rest
            if begun:  # it was cut off, or is still being written
                return text if opened else text.partition(opening)[2], ""
        return "", _after(text, around.before_text)

    def _calls(self, text: str) -> tuple[str, tuple[Mapping[str, Any], ...]]:
        """The text before the calls, and the calls; none where they cannot be read."""
        if not self._around.call or not (before_name := self._around.call[0].strip()):
            return text, ()
        first, calls, at = text.find(before_name), [], 0
        if first < 0:
            return text, ()
        at = first
        while at >= 0:
            call, at = self._call(text, at + len(before_name))
            if call is None:
                return text, ()
            calls.append(call)
            at = text.find(before_name, at)
        return text[:first], tuple(calls)

    def _call(self, text: str, at: int) -> tuple[Mapping[str, Any] | None, int]:
        """One call whose name begins at `at`, and where it ends."""
        _, before_key, before_value, between, after = (part.strip() for part in self._around.call)
        brace = self._around.call[1].rfind("{")
        lead = self._around.call[1][:brace].strip() if brace >= 0 else before_key
        name, found, rest = text[at:].partition(lead) if lead else (text[at:], "", "")
        if not found:
            return None, at
        start = at + len(name) + len(found)
        if brace >= 0:
            start += len(text[start:]) - len(text[start:].lstrip())
            try:
                arguments, end = json.JSONDecoder().raw_decode(text, start)
            except ValueError:
                return None, at
            return ({"name": name.strip(), "arguments": arguments}, end) if isinstance(arguments, dict) else (None, at)
        body, closed, _ = rest.partition(after)
        if not closed:
            return None, at
        pairs = (part.partition(before_value) for part in body.split(between))
        arguments = {key.strip(): _value(value) for key, _, value in pairs}
        return {"name": name.strip(), "arguments": arguments}, start + len(body) + len(closed)

    def _look(self) -> _Around:
        prompt = self._render([_ASKED], generation_prompt=True)
        thinking = self._after(prompt, {"content": _CONTENT, **dict.fromkeys(THOUGHT_FIELDS, _THOUGHT)})
        plain = self._after(prompt, {"content": _CONTENT})
        before, _, rest = thinking.partition(_THOUGHT)
        between = rest.partition(_CONTENT)[0] if _CONTENT in rest else ""
        if not before.strip() and between:
            before = _opening(prompt)
        return _Around(before, between, plain.partition(_CONTENT)[0], self._look_at_calls(prompt))

    def _look_at_calls(self, prompt: str) -> tuple[str, ...]:
        arguments = dict(zip(_KEYS, _VALUES, strict=True))
        call = {"id": "000000000", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
        turn: Message = {"role": "assistant", "content": "", CALLS: [call]}
        form = self._reader.forms.of((_ASKED, turn), None, {})
        text = self._after(prompt, form.messages([turn])[0])
        pattern = "(.*?)".join(map(re.escape, (_NAME, _KEYS[0], _VALUES[0], _KEYS[1], _VALUES[1])))
        found = re.search(rf"^(.*?){pattern}(.*)$", text, re.DOTALL)
        if not found or found[3] != found[5]:
            return ()
        before = _after(found[1], self._around_text(prompt))
        return before, found[2], found[3], found[4], self._without_end(found[6])

    def _around_text(self, prompt: str) -> str:
        return self._after(prompt, {"content": _CONTENT}).partition(_CONTENT)[0]

    def _after(self, prompt: str, keys: Mapping[str, Any]) -> str:
        """What the template writes for an answer, beyond the prompt."""
        text = self._render([_ASKED, {"role": "assistant", **keys}])
        asked = self._render([_ASKED])
        return text[len(prompt) :] if text.startswith(prompt) else text[len(asked) :] if text.startswith(asked) else ""

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        try:
            return self._reader.template.render(messages, generation_prompt=generation_prompt)
        except InvalidRow:
            return ""


def _schema(tokenizer: PreTrainedTokenizerBase, template: str) -> Any:
    """How transformers reads this tokenizer's answers; TRL knows it for templates that it recognises."""
    if getattr(tokenizer, "response_template", None) is not None:
        return tokenizer.response_template
    from trl.chat_template_utils import add_response_schema

    known: Any = copy.copy(tokenizer)
    known.chat_template = template
    try:
        return getattr(add_response_schema(known), "response_template", None)
    except ValueError:
        return None


def _after(text: str, header: str) -> str:
    """`text` without the header that it may begin with."""
    bare, wanted = text.lstrip(), header.strip()
    return bare.removeprefix(wanted) if wanted and bare.startswith(wanted) else text


def _opening(prompt: str) -> str:
    """The tag with which a prompt opens a thought."""
    found = re.search(r"<[^<>\s]+>\s*$", prompt)
    return found.group() if found else ""


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip("\n")
