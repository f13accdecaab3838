"""What a model wrote, read: its thought, its text and its calls, as the chat template would be given them again.

Where the tokenizer says how its answers are read (transformers' `response_template`, and TRL's for published
templates), that is done. Elsewhere, and where that finds less, the template's own rendering of unique words
says what stands around each part. An answer that is still being written is read again and again, and what comes of it
is sent: an end that may become a mark (`</thi`, `<tool_`) is held back until it is one or none, and so is all from the
first mark of a call on.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.data.calls import CallForm, call_turn, learn_calls
from toolkit.data.conversation import CALLS, THOUGHT_FIELDS, Message, thought_of, without_thought
from toolkit.data.template import end_of_open_tag
from toolkit.data.turns import TurnReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "AnswerReader", "AnswerStream", "Marks"]

_BEGINS = re.compile(r"(?:^|(?<=\s)|(?=<))\S")

_THOUGHT, _CONTENT = "onecardprobethought", "onecardprobecontent"
_TAG, _END = "<think>", "</think>"
_ASKED: Message = {"role": "user", "content": "onecardprobeasked"}


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


@dataclass(frozen=True)
class _Around:
    """What a template writes around the parts of an answer; empty where it does not write such a part.

    `header` asks for an answer; `after_thought` are the ends that a thought may have, before text and before calls.
    """

    header: str
    before_thought: str
    after_thought: tuple[str, ...]
    before_text: str
    calls: CallForm | None

    @property
    def marks(self) -> tuple[str, ...]:
        """All of these."""
        calls = self.calls.marks if self.calls else ()
        return (self.header, self.before_thought, *self.after_thought, self.before_text, *calls, _TAG, _END)


class AnswerReader:
    """Reads answers under one tokenizer and template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, decode: Callable[[Sequence[int]], str], reader: TurnReader
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._decode, self._reader = decode, reader
        # How transformers reads such answers; None where nobody has described it.
        self._described: Any = _schema(tokenizer, reader.template.text())
        self._asked = reader.template.try_render([_ASKED])
        self._prompt = reader.template.try_render([_ASKED], generation_prompt=True)
        self._around = self._look()
        self._marks = Marks(self._around.marks)

    def read(self, ids: Sequence[int], prompt_ids: Sequence[int]) -> Answer:
        """The parts of what was written after a prompt."""
        return self._read(self._decode(ids), self._decode(prompt_ids))

    def stream(self, prompt: str) -> AnswerStream:
        """Reads an answer to `prompt` as it comes."""
        return AnswerStream(
            lambda text, ended: self._begun(text, prompt, ended=ended), lambda text: self._read(text, prompt)
        )

    def _read(self, text: str, prompt: str) -> Answer:
        ours = self._by_rendering(text, prompt)
        theirs = self._by_schema(text, prompt) if self._described is not None else None
        return ours if theirs is None or _finds_less(theirs, ours) else theirs

    def _begun(self, text: str, prompt: str, *, ended: bool) -> Answer:
        """What no further words take back; a thought that nobody opened is text here, since it has been sent."""
        stop, around = self._reader.stops.first(text), self._around
        if not (ended or stop):
            text = text[: len(text) - self._marks.held(text)]
        text = _after(text.partition(stop)[0] if stop else text, around.header)
        found = self._thought(text, prompt)
        if found is None and not ended and not around.before_thought.strip() and any(around.after_thought):
            return Answer("")  # all of it may be a thought
        thought, rest = found or ("", text)
        calls: tuple[Mapping[str, Any], ...] = ()
        if around.calls:
            said = _after(rest, around.before_text)
            rest, calls = around.calls.read(rest) if ended else (around.calls.before(said), ())
        return Answer(self._plain(_after(rest, around.before_text)), self._plain(thought), calls)

    def _plain(self, text: str) -> str:
        """Without special tokens."""
        return self._reader.stops.special.sub("", text).strip()

    def _by_schema(self, text: str, prompt: str) -> Answer | None:
        try:
            found = self._tokenizer.parse_response(text, schema=self._described, prefix=prompt)
        except (ValueError, TypeError, KeyError, IndexError):  # an answer that is not in the form
            return None
        if not isinstance(found, Mapping) or not isinstance(found.get("content") or "", str):
            return None
        calls = [call.get("function", call) for call in found.get(CALLS) or () if isinstance(call, Mapping)]
        thought = next((found[key] for key in THOUGHT_FIELDS if isinstance(found.get(key), str)), "")
        kept = tuple({"name": call.get("name"), "arguments": call.get("arguments") or {}} for call in calls)
        content = found.get("content") or ""
        # Some descriptions run into the prompt.
        if content.strip() not in text or not (content or thought or kept):
            return None
        return Answer(self._plain(content), thought.strip(), kept)

    def _by_rendering(self, text: str, prompt: str) -> Answer:
        stop = self._reader.stops.first(text)
        text = _after(text.partition(stop)[0] if stop else text, self._around.header)
        inline: Message = {"role": "assistant", "content": text}
        found = self._thought(text, prompt)
        thought, rest = found or (thought_of(inline), str(without_thought(inline)["content"]))
        calls: tuple[Mapping[str, Any], ...] = ()
        if self._around.calls:
            rest, calls = self._around.calls.read(rest)
        return Answer(self._plain(_after(rest, self._around.before_text)), self._plain(thought), calls)

    def _thought(self, text: str, prompt: str) -> tuple[str, str] | None:
        """The thought and what follows it; None where none was opened, as far as the template says."""
        around = self._around
        opening = around.before_thought.strip()
        opened = bool(opening) and prompt.rstrip().endswith(opening)
        closings = list(filter(None, map(str.strip, around.after_thought)))
        for tag, ends in ((opening, closings), (_TAG, [*closings, _END])):
            if not opened and tag and text.lstrip().startswith(tag):
                text, opened, closings = text.lstrip().removeprefix(tag), True, ends
        ended = min(((at, -len(each), each) for each in closings if (at := text.find(each)) >= 0), default=None)
        if ended and (opened or not opening or not self._plain(text[: ended[0]])):
            return text[: ended[0]], text[ended[0] + len(ended[2]) :]
        return (text, "") if opened else None  # it was cut off, or is still being written

    def _look(self) -> _Around:
        prompt, asked = self._prompt, self._asked
        thinking = self._written({"content": _CONTENT, **dict.fromkeys(THOUGHT_FIELDS, _THOUGHT)})
        before, thinks, rest = thinking.partition(_THOUGHT)
        before = before if thinks else ""
        ends = [rest.partition(_CONTENT)[0]] if _CONTENT in rest else []
        closing = end_of_open_tag(prompt)
        if closing and not before.strip() and (ends or closing in self._reader.template.text()):
            before, ends = closing.replace("/", "", 1), ends or [closing]
        calls = learn_calls(self._written)
        if calls:
            written = self._written({**call_turn(), **dict.fromkeys(THOUGHT_FIELDS, _THOUGHT)})
            start, _, after = written.partition(_THOUGHT)
            end, found, _ = after.partition(calls.opening.strip())
            ends += [end] if found and end.strip() else []
            before = before or (start if after else "")
        header = prompt[len(asked) :] if prompt.startswith(asked) else ""
        before_text = self._written({"content": _CONTENT}).partition(_CONTENT)[0]
        return _Around(header, before, tuple(ends), before_text, calls)

    def _written(self, keys: Mapping[str, Any]) -> str:
        """What the template writes for an answer, beyond the prompt."""
        turn = {"role": "assistant", **keys}
        form = self._reader.forms.of((_ASKED, turn), None, {})
        prompt, asked = self._prompt, self._asked
        text = self._reader.template.try_render(form.messages([_ASKED, turn]))
        return text[len(prompt) :] if text.startswith(prompt) else text[len(asked) :] if text.startswith(asked) else ""


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


def _finds_less(one: Answer, other: Answer) -> bool:
    """Whether `one` misses the calls, or the text beside the same calls and thought."""
    if one.calls and other.calls:
        return bool(other.text) and not one.text and one.thought == other.thought
    return bool(other.calls)


def _after(text: str, header: str) -> str:
    """`text` without the header that it may begin with."""
    bare, wanted = text.lstrip(), header.strip()
    return bare.removeprefix(wanted) if wanted and bare.startswith(wanted) else text
