"""What a model wrote, read: its thought, its text and its calls, as the chat template would be given them again.

Where the tokenizer says how its answers are read (transformers' `response_template`, and TRL's for published
templates), that is done. Elsewhere, and where that finds less, the template's own rendering of unique words
says what stands around each part.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.data.calls import CallForm, call_turn, learn_calls
from toolkit.data.conversation import CALLS, THOUGHT_FIELDS, Message, thought_of, without_thought
from toolkit.data.template import end_of_open_tag
from toolkit.data.tokens import Tokens
from toolkit.data.turns import TurnReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "AnswerReader"]

_THOUGHT, _CONTENT = "onecardprobethought", "onecardprobecontent"
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
    """What a template writes around the parts of an answer; empty where it does not write such a part.

    `header` asks for an answer; `after_thought` are the ends that a thought may have, before text and before calls.
    """

    header: str
    before_thought: str
    after_thought: tuple[str, ...]
    before_text: str
    calls: CallForm | None


class AnswerReader:
    """Reads answers under one tokenizer and template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Tokens, reader: TurnReader) -> None:
        self._tokenizer: Any = tokenizer
        self._tokens, self._reader = tokens, reader
        self.described: Any = _schema(tokenizer, reader.template.text())
        """How transformers reads such answers; None where nobody has described it."""
        self._asked = reader.template.try_render([_ASKED])
        self._prompt = reader.template.try_render([_ASKED], generation_prompt=True)
        self._around = self._look()

    def read(self, ids: Sequence[int], prompt_ids: Sequence[int]) -> Answer:
        """The parts of what was written after a prompt."""
        prompt, text = self._tokens.decode(prompt_ids), self._tokens.decode(ids)
        ours = self._by_rendering(text, prompt)
        theirs = self._by_schema(text, prompt) if self.described is not None else None
        return ours if theirs is None or (ours.calls and not theirs.calls) else theirs

    def _plain(self, text: str) -> str:
        """Without special tokens."""
        return self._reader.stops.special.sub("", text).strip()

    def _by_schema(self, text: str, prompt: str) -> Answer | None:
        try:
            found = self._tokenizer.parse_response(text, schema=self.described, prefix=prompt)
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
        thought, rest = self._thought(_after(text.partition(stop)[0] if stop else text, self._around.header), prompt)
        calls: tuple[Mapping[str, Any], ...] = ()
        if self._around.calls:
            rest, calls = self._around.calls.read(rest)
        return Answer(self._plain(_after(rest, self._around.before_text)), self._plain(thought), calls)

    def _thought(self, text: str, prompt: str) -> tuple[str, str]:
        """The thought and what follows it."""
        around = self._around
        opening = around.before_thought.strip()
        opened = bool(opening) and prompt.rstrip().endswith(opening)
        if not opened and opening and text.lstrip().startswith(opening):
            text, opened = text.lstrip().removeprefix(opening), True
        for closing in filter(None, map(str.strip, around.after_thought)):
            thought, found, rest = text.partition(closing)
            if found and (opened or not opening or not self._plain(thought)):
                return thought, rest
        if opened:  # it was cut off, or is still being written
            return text, ""
        inline = {"role": "assistant", "content": text}
        return thought_of(inline), str(without_thought(inline)["content"])

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


def _after(text: str, header: str) -> str:
    """`text` without the header that it may begin with."""
    bare, wanted = text.lstrip(), header.strip()
    return bare.removeprefix(wanted) if wanted and bare.startswith(wanted) else text
