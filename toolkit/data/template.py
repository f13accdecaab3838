"""Chat template to text and to the character spans of the answers, or a refusal; never a guessed mask.

transformers returns an assistant mask only for templates with `{% generation %}` markers, and such masks often leave
out the end-of-turn token, without which a model never learns to stop. Spans come from the markers where there are
any, otherwise from rendering the conversation up to each answer; either way the end-of-turn token is put inside.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from toolkit.data.conversation import Message
from toolkit.data.formats import Example
from toolkit.data.problems import InvalidRow
from toolkit.data.sandbox import require_frugal
from toolkit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "ChatRenderer"]

# What a template can raise on a conversation it does not expect: Jinja's own, and those of the Python values in it.
_RAISED = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "onecardprobe"
_OVERLAP = 16
_RENDER: Any = render_jinja_template  # it is annotated to return text, and returns texts and spans


@dataclass(frozen=True, slots=True)
class Answer:
    """One assistant turn in the rendered text: characters [start, end), end-of-turn token included where it has one."""

    turn: int
    start: int
    end: int


class ChatRenderer:
    """Renders conversations with one tokenizer's template, and finds the answers in the rendered text.

    Args:
        tokenizer: its special tokens are what may close a turn.
        chat_template: Jinja text to use instead of the tokenizer's.

    Raises:
        DataError: there is no template, or it is not Jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        if chat_template is None and tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template and the data is chat; set data.chat_template_path")
        self._tokenizer = tokenizer
        self._template = chat_template
        self.closers: set[str] = set()
        """Texts of the end-of-turn tokens seen so far."""
        require_frugal(self._render_samples)
        self._specials = sorted(_special_tokens(tokenizer), key=len, reverse=True)
        self._generation_prompt, openers = self._probe()
        closing = [re.escape(token) for token in self._specials if token not in openers]
        # Without a special token nothing can close a turn; `(?!)` never matches.
        self._closing = re.compile(rf"\s*({'|'.join(closing) or '(?!)'})")

    def render(
        self,
        messages: tuple[Message, ...],
        tools: list[dict[str, Any]] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> str:
        """The conversation as text.

        Raises:
            InvalidRow: the template refuses it.
        """
        return self._render(messages, tools, generation_prompt)[0]

    def answers(self, example: Example, *, last_only: bool = False) -> tuple[str, list[Answer]]:
        """The rendered conversation and its assistant turns (the last one alone with `last_only`).

        Raises:
            InvalidRow: the template refuses the conversation, leaves an answer out, or rewrites earlier turns so that
                an answer's place cannot be proved.
        """
        text, marked = self._render(example.messages, example.tools)
        turns = [i for i, turn in enumerate(example.messages) if turn["role"] == "assistant"]
        if len(marked) == len(turns):
            found = [self._from_marker(text, i, span, example) for i, span in zip(turns, marked, strict=True)]
            return text, found[-1:] if last_only else found
        return text, [self._from_prefix(text, i, example) for i in (turns[-1:] if last_only else turns)]

    def _render(
        self, messages: tuple[Message, ...], tools: list[dict[str, Any]] | None, generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            template = self._tokenizer.get_chat_template(self._template, tools)
            texts, spans = _RENDER(
                [list(messages)],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=_MARKERS.search(template) is not None,
                add_generation_prompt=generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
            texts[0].encode("utf-8")
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"chat template, line {error.lineno}: {error.message}; it is not valid Jinja") from None
        except UnicodeEncodeError:
            raise InvalidRow("not Unicode", "half of a surrogate pair (\\ud800…\\udfff) stands alone in it") from None
        except _RAISED as error:
            detail = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise InvalidRow("refused by the chat template", f"the chat template refuses it: {detail}") from None
        return texts[0], [(a, b) for a, b in (spans[0] if spans else []) if b > a]

    def _render_samples(self) -> None:
        """Short conversations of several shapes, so that a template that runs away does it where it is watched."""
        turns: tuple[Message, ...] = (
            {"role": "system", "content": _PROBE},
            *({"role": role, "content": _PROBE} for role in ("user", "assistant") * 2),
        )
        with contextlib.suppress(DataError):  # not Jinja at all
            for messages in (turns[1:2], turns[1:3], turns[1:], turns):
                for generation_prompt in (False, True):
                    with contextlib.suppress(InvalidRow):
                        self.render(messages, generation_prompt=generation_prompt)

    def _probe(self) -> tuple[str, set[str]]:
        """The header of an assistant turn, and the special tokens that open turns rather than close them."""
        eos = {str(self._tokenizer.eos_token)}
        question = ({"role": "user", "content": _PROBE},)
        try:
            asked, prompted = self.render(question), self.render(question, generation_prompt=True)
        except InvalidRow:
            return "", {str(self._tokenizer.bos_token)} - eos
        header = prompted[_agreed(asked, prompted) :]
        before, _, after = asked.partition(_PROBE)
        # A system block before the question ends with the token that ends the question: that one closes.
        shut = re.match(rf"\s*({'|'.join(map(re.escape, self._specials)) or '(?!)'})", after)
        openers = {token for token in self._specials if token in before + header}
        openers -= {shut.group(1)} if shut else set()
        return header, (openers | {str(self._tokenizer.bos_token)}) - eos

    def _from_marker(self, text: str, turn: int, span: tuple[int, int], example: Example) -> Answer:
        """A marked turn, less what a generation prompt would have given of it: markers often begin too early."""
        start, end = span
        header = self._generation_prompt
        given = (
            at + len(header) for at in range(max(start - len(header) + 1, 0), start + 1) if text.startswith(header, at)
        )
        start = max((at for at in given if start < at <= end), default=start)
        while opener := next((t for t in self._specials if t in header and text.startswith(t, start, end)), None):
            start += len(opener)
        return self._close(text, turn, start, end, example)

    def _from_prefix(self, text: str, turn: int, example: Example) -> Answer:
        """A turn after the text of what comes before it; each step is proved on the text or refused."""
        message = example.messages[turn]
        before = self.render(example.messages[:turn], example.tools, generation_prompt=True)
        if not text.startswith(before):
            return self._after_other_header(text, turn, before, example)
        if end := self._directly(text, len(before), message):
            return self._close(text, turn, len(before), end, example)
        # The template writes more than the content (tool calls, a channel, reasoning): up to where this turn ends.
        upto = self.render(example.messages[: turn + 1], example.tools)
        end = self._content_end(upto, len(before), len(upto), message)
        if end <= len(before):
            raise _left_out(turn)
        if not text.startswith(upto[:end]):
            end = self._before_next(text, turn, example)
        if end <= len(before):
            raise _rewritten(turn)
        return self._close(text, turn, len(before), end, example)

    def _after_other_header(self, text: str, turn: int, before: str, example: Example) -> Answer:
        """A turn whose header is not the generation prompt, which may open a thought: its content must follow."""
        asked = self.render(example.messages[:turn], example.tools)
        agreed = _agreed(text, before)
        # The content may begin like the rest of the generation prompt: `<b>` where that goes on with `<think>`.
        for start in range(agreed, max(len(asked), agreed - _OVERLAP) - 1, -1):
            if text.startswith(asked) and (end := self._directly(text, start, example.messages[turn])):
                return self._close(text, turn, start, end, example)
        raise _rewritten(turn)

    def _directly(self, text: str, start: int, message: Message) -> int:
        """Where the content ends that stands at `start`, with a closing token after it; 0 where it does not."""
        content = message.get("content", "").strip()
        while text[start : start + 1].isspace():
            start += 1
        end = start + len(content)
        plain = content and not message.get("tool_calls") and text.startswith(content, start)
        return end if plain and self._closing.match(text, end) else 0

    def _before_next(self, text: str, turn: int, example: Example) -> int:
        """Where the last end-of-sequence token stands before the words of the next turn; 0 where that is not sure.

        Some templates render a turn in another way while it is the last one, so it is rendered before a turn with
        other words, and everything before those words must be the same.
        """
        following = example.messages[turn + 1 : turn + 2]
        if not following or following[0]["role"] == "assistant":
            return 0
        other = self.render((*example.messages[: turn + 1], {**following[0], "content": _PROBE}), example.tools)
        words = other.rfind(_PROBE)
        eos = str(self._tokenizer.eos_token)
        at = text.rfind(eos, 0, words) if words > 0 and text.startswith(other[:words]) else -1
        return at + len(eos) if at >= 0 else 0

    def _content_end(self, text: str, start: int, end: int, message: Message) -> int:
        """Where the words of a turn in text[start:end] end, before whitespace and closing tokens."""
        ends = self._trailing(text[start:end])
        # The content may itself end in the text of special tokens: that many are words.
        own = 0 if message.get("tool_calls") else len(self._trailing(message.get("content", ""))) - 1
        return start + ends[max(len(ends) - 1 - own, 0)]

    def _trailing(self, text: str) -> list[int]:
        """Where `text` ends without its last 0, 1, … all of its trailing special tokens, and whitespace."""
        bare = text.rstrip()
        ends = [len(bare)]
        while token := next((t for t in self._specials if bare.endswith(t)), None):
            bare = bare.removesuffix(token).rstrip()
            ends.append(len(bare))
        return ends

    def _close(self, text: str, turn: int, start: int, end: int, example: Example) -> Answer:
        message = example.messages[turn]
        words = self._content_end(text, start, end, message)
        if not _says(text[start:words], message):
            raise _left_out(turn)
        closing = self._closing_after(text, words, calls=bool(message.get("tool_calls")))
        if closing is None:
            return Answer(turn, start, words)
        self.closers.add(closing.group(1))
        return Answer(turn, start, closing.end())

    def _closing_after(self, text: str, position: int, *, calls: bool) -> re.Match[str] | None:
        """The token that closes the turn whose words end at `position`.

        The end-of-sequence token, where other closing tokens alone stand before it; otherwise the first of them.
        Whitespace parts the turn's end from the end of the whole text, unless a tool call is wrapped in tokens.
        """
        first = after = self._closing.match(text, position)
        while after is not None and after.group(1) != self._tokenizer.eos_token:
            after = self._closing.match(text, after.end())
            if after is not None and not calls and after.start() != after.start(1):
                return first
        return after or first


def _agreed(one: str, other: str) -> int:
    """How many leading characters two texts share."""
    return len(commonprefix([one, other]))  # noqa: RUF071 - characters are meant, not parts of a path


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {token for token in added | set(tokenizer.all_special_tokens) if token.strip()}


def _says(rendered: str, message: Message) -> bool:
    """Whether the rendered turn holds what the message says: a template may leave calls or content out silently."""
    calls = [call.get("function", call)["name"] for call in message.get("tool_calls", [])]
    lines = message.get("content", "").strip().splitlines()
    return all(name in rendered for name in calls) and (not lines or lines[-1].strip() in rendered)


def _left_out(turn: int) -> InvalidRow:
    return InvalidRow(
        "left out by the chat template",
        f"the chat template leaves out what turn {turn + 1} (assistant) says; give one that renders it",
    )


def _rewritten(turn: int) -> InvalidRow:
    return InvalidRow(
        "rewritten by the chat template",
        f"the chat template rewrites what stands before or in turn {turn + 1} (assistant) once more turns follow, "
        "so its tokens cannot be marked; give a template with {% generation %} markers as data.chat_template_path",
    )
