"""One assistant turn as inference meets it: the prompt that is fed, and what the model has to write after it.

For every trained turn, P is the history rendered with the generation prompt, C the history with the turn. Where C
begins with P, what follows through the first stop token is the target. Where it does not, because the prompt opens a
thought that the row has not or that the template leaves out, the target is put together in the template's own words;
where that cannot be proved the row is refused. transformers' masks mark what a template's author put between markers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal

from toolkit.data.conversation import CALLS, THOUGHT_FIELDS, Message, text_of, thought_of, without_thought
from toolkit.data.formats import Example
from toolkit.data.forms import Form, Forms
from toolkit.data.problems import InvalidRow
from toolkit.data.said import Probe, left_out, texts_of
from toolkit.data.stops import Stops
from toolkit.data.template import ChatTemplate, Options, end_of_open_tag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CLOSED", "Turn", "TurnReader", "groups"]

Tools = list[dict[str, Any]] | None
_CONTENT, _THOUGHT = "onecardprobewords", "onecardprobethought"
CLOSED = "the generation prompt opens a thought and the answer has none: an empty one is closed before it"
_OPENED = "the chat template opens a thought that the generation prompt has opened: it is opened once"
_OF_THOUGHTS = re.compile(r"</[\w-]*(?:think|thought|reason)[\w-]*>", re.IGNORECASE)
"""Tags that close a thought."""
_OTHER_HISTORY = "the chat template renders history differently once answered: training uses inference's prompt"
_NO_TOOLS = "the chat template leaves out the tools"
_TRIMMED = "the chat template strips white space around messages"
_REWRITTEN = "a thought in <think>…</think> is given to the chat template as reasoning_content, which it reads"
_COMPLETED = "the chat template leaves a thought out of its answer: it is trained as the generation prompt opens it"


@dataclass(frozen=True, slots=True)
class Turn:
    """What is fed, and what has to be written after it, through the token that ends it."""

    index: int
    prompt: str
    target: str
    ender: str
    has_thought: bool


class TurnReader:
    """Finds prompt and target of assistant turns under one template.

    Args:
        stop_token_ids: those that the checkpoint declares.
        thoughts: `drop` leaves the thoughts of all rows out.

    `notices` are what deserves a look but is no error; `take_notices` gives and forgets those of the last conversation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        *,
        stop_token_ids: Iterable[int] = (),
        thoughts: Literal["keep", "drop"] = "keep",
    ) -> None:
        self.template = template
        self.stops = Stops(tokenizer, template, stop_token_ids)
        self.forms = Forms(template)
        self.drops_thoughts = thoughts == "drop"
        self.openers: dict[str, bool] = {}
        """Whether the text that asks for an answer opens a thought, by that text."""
        self.trimmed: dict[tuple[str, str, str], bool] = {}
        """Whether white space around words is left out, by role and what stands before and after them."""
        self._notices: list[str] = []

    def take_notices(self) -> list[str]:
        """What was noticed since the last call."""
        noticed, self._notices = self._notices, []
        return noticed

    def read(self, example: Example, wanted: Sequence[int]) -> list[Turn]:
        """Prompt and target of the turns `wanted`.

        Raises:
            InvalidRow: the template refuses the conversation, leaves out or rewrites something that it says, or nothing
                ends a turn.
        """
        messages: Sequence[Message] = example.messages
        if self.drops_thoughts:
            messages = [without_thought(message) for message in messages]
        form = self.forms.of(messages, example.tools, example.chat_template_kwargs)
        said, tools = form.messages(messages), form.tools(example.tools)
        reading = _Reading(self, said, tools, example.chat_template_kwargs)
        turns = [reading.turn(turn) for turn in wanted]
        reading.require_all_said(wanted, form)
        unread = self.template.unread(example.chat_template_kwargs)
        tools_lost = [] if form.tells_tools else [_NO_TOOLS]
        self._notices += [*form.notices(messages), *reading.notices, *unread, *tools_lost]
        return turns

    def prompt(self, messages: Sequence[Message], tools: Tools = None, options: Mapping[str, Any] = {}) -> str:
        """What inference feeds for the answer to `messages`."""
        form = self.forms.of(messages, tools, options)
        return self.template.render(form.messages(messages), form.tools(tools), generation_prompt=True, options=options)


class _Reading:
    """One conversation being read."""

    def __init__(self, reader: TurnReader, messages: Sequence[Message], tools: Tools, options: Options) -> None:
        self._template, self._stops = reader.template, reader.stops
        self._openers, self._trimmed = reader.openers, reader.trimmed
        self._messages, self._tools, self._options = messages, tools, options
        self._rendered: dict[tuple[int, bool], str] = {}
        self.notices: list[str] = []

    def turn(self, turn: int) -> Turn:
        message = self._messages[turn]
        self._require_no_stop_inside(turn)
        prompt, rendered = self._render(turn, generation_prompt=True), self._render(turn + 1)
        rest = rendered[len(prompt) :]
        if not rendered.startswith(prompt):
            rest = self._put_together(turn, prompt, rendered)
        elif not thought_of(message) and (_closes_tag(prompt, rest) or self._opens_thought(turn, prompt)):
            self.notices.append(CLOSED)
        else:
            rest = self._in_open_thought(turn, prompt, rest)
        if kind := left_out(rest, message):
            raise self._left_out(turn, kind)
        target, ender = self._stops.through(rest, self._messages, turn, self._tools, self._options)
        if kind := left_out(target, message):
            raise self._left_out(turn, kind)
        return Turn(turn, prompt, target, ender, bool(thought_of(message)))

    def require_all_said(self, wanted: Sequence[int], form: Form) -> None:
        """Raise where the template leaves out something that stands before the last answer.

        An answer that has been trained in its own place may be shortened later: inference shortens it, too.
        """
        last = wanted[-1]
        whole = self._render(last + 1)
        lost = [(turn, kind) for turn, kind in form.lost if turn < last and kind != "thought"]
        found = ((turn, left_out(whole, message, thought=False)) for turn, message in enumerate(self._messages[:last]))
        for turn, kind in (*lost, *((turn, kind) for turn, kind in found if kind)):
            if turn not in wanted:
                raise self._left_out(turn, kind)
            self.notices.append("the chat template shortens earlier answers, in training as it does at inference")
        if any(self._is_trimmed(turn, last) for turn in range(last + 1)):
            self.notices.append(_TRIMMED)

    def _is_trimmed(self, turn: int, last: int) -> bool:
        """Whether white space around a message's words is not rendered: with less of it the rendering is the same."""
        message, whole = self._messages[turn], self._render(last + 1)
        content = without_thought(message).get("content")
        if not isinstance(content, str) or content == content.strip():
            return False
        if content not in whole or content != message["content"]:
            return content not in whole
        before, _, after = content.partition(content.strip() or content)
        edges = (message["role"], before, after)
        if edges not in self._trimmed:  # what stands around the words may be the template's own white space
            fewer = {content[before != "" :], content[: len(content) - (after != "")]} - {content}
            self._trimmed[edges] = any(self._with_content(turn, less, last) == whole for less in fewer)
        return self._trimmed[edges]

    def _with_content(self, turn: int, content: str, last: int) -> str:
        """The rendering with other words in a turn; nothing where the template refuses it."""
        told = {**self._messages[turn], "content": content}
        messages = (*self._messages[:turn], told, *self._messages[turn + 1 : last + 1])
        return self._template.try_render(messages, self._tools, options=self._options)

    def _render(self, upto: int, *, generation_prompt: bool = False) -> str:
        key = (upto, generation_prompt)
        if key not in self._rendered:
            self._rendered[key] = self._template.render(
                self._messages[:upto], self._tools, generation_prompt=generation_prompt, options=self._options
            )
        return self._rendered[key]

    def _with_last(self, turn: int, last: Message, options: Mapping[str, Any] = {}) -> str:
        """The history with another last message; nothing where the template refuses it."""
        messages = (*self._messages[:turn], last)
        return self._template.try_render(messages, self._tools, options={**self._options, **options})

    def _require_no_stop_inside(self, turn: int) -> None:
        for _, told in texts_of(self._messages[turn]):
            inside = self._stops.first(told)
            if inside and told.rstrip() != told.partition(inside)[0] + inside:
                raise InvalidRow(
                    "stops inside an answer",
                    f"turn {turn + 1} (assistant) holds the text of {inside}, at which generation stops, so what "
                    "follows it could never be written; take it out of the answer",
                )

    def _opens_thought(self, turn: int, prompt: str) -> bool:
        """Whether the prompt ends where the template writes a thought."""
        tail = prompt[_agreed(self._render(turn), prompt) :]
        if tail not in self._openers:
            shown = self._with_last(turn, {"role": "assistant", "content": _CONTENT, THOUGHT_FIELDS[0]: _THOUGHT})
            self._openers[tail] = shown.startswith(prompt) and shown[len(prompt) :].lstrip().startswith(_THOUGHT)
        return self._openers[tail]

    def _put_together(self, turn: int, prompt: str, rendered: str) -> str:
        """What has to follow a prompt that the rendering does not begin with, in the template's own words."""
        message, thought = without_thought(self._messages[turn]), thought_of(self._messages[turn]).strip()
        if (written := self._after_thought(turn, message, prompt, thought or _THOUGHT)) is not None:
            self.notices.append(_REWRITTEN if thought else CLOSED)
            return written if thought else written.replace(_THOUGHT, "")
        if followed := self._after_header(turn, prompt, rendered):
            self.notices.append(_OTHER_HISTORY)
            return followed
        begins, whole = self._words_begin(turn, message, prompt), self._with_last(turn, message)
        if begins is not None and not thought and self._only_adds(turn, prompt, whole[:begins]):
            self.notices.append(_OTHER_HISTORY)
            return whole[begins:]
        closing = None if begins is None else self._closing(turn, prompt, whole[:begins])
        if closing is None:
            raise self._left_out(turn, "thought") if thought else _rewritten(turn)
        self.notices.append(_COMPLETED if thought else CLOSED)
        return thought + closing + whole[begins:]

    def _in_open_thought(self, turn: int, prompt: str, rest: str) -> str:
        """What follows a prompt that opens a thought, where the template writes answers as if it did not."""
        tag = end_of_open_tag(prompt)
        opening = tag.replace("/", "", 1)
        if tag and rest.lstrip().startswith(opening):
            self.notices.append(_OPENED)
            return rest.lstrip()[len(opening) :].lstrip("\n")
        if not _OF_THOUGHTS.fullmatch(tag) or tag in rest:
            return rest
        self.notices.append(CLOSED)
        return (self._closing(turn, prompt, prompt) or "") + rest

    def _after_thought(self, turn: int, message: Message, prompt: str, thought: str) -> str | None:
        """The answer as the template writes it after a thought that it is given by name."""
        for keys in (THOUGHT_FIELDS[:1], THOUGHT_FIELDS):
            shown = self._with_last(turn, {**message, **dict.fromkeys(keys, thought)})
            if shown.startswith(prompt) and thought in shown[len(prompt) :]:
                return shown[len(prompt) :]
        return None

    def _after_header(self, turn: int, prompt: str, rendered: str) -> str | None:
        """The answer after the header that asks for it, where only what stands before that header is changed by it."""
        header = prompt[_agreed(self._render(turn), prompt) :]
        words = Probe(self._messages[: turn + 1], None)
        other = self._with_last(turn, words.messages[turn])
        begins = _agreed(rendered, other)
        at = rendered.rfind(header, 0, begins) if header.strip() else -1
        if at < 0 or left_out(rendered[at:], self._messages[turn]) or self._stops.special.search(header) is None:
            return None
        between = rendered[at + len(header) : begins]
        said_before = (told for message in self._messages[:turn] for _, told in texts_of(message))
        return (
            None
            if any(told.strip() in between for told in said_before if told.strip())
            else rendered[at + len(header) :]
        )

    def _only_adds(self, turn: int, prompt: str, header: str) -> bool:
        """Whether the prompt is the header of an answer and what an option adds: an empty thought, closed."""
        before = self._render(turn)
        header, prompt = (text[_agreed(before, text) :] for text in (header, prompt))
        for option in self._template.switches:  # which may write a mark into the history as well
            options = {**self._options, option: True}
            other = self._template.try_render(self._messages[:turn], self._tools, options=options)
            bare = self._prompt_with(turn, {option: True})
            bare = bare[_agreed(other, bare) :]
            if bare.strip() and bare.strip() == header.strip() and prompt.startswith(bare):
                return True
        return False

    def _words_begin(self, turn: int, message: Message, prompt: str) -> int | None:
        """Where an answer's words begin in its rendering; None where what stands before them is not the header."""
        rendered = self._with_last(turn, message)
        if not text_of(message.get("content")).strip():
            message = {key: value for key, value in message.items() if key != CALLS}
        marked = self._with_last(turn, {**message, "content": _CONTENT})
        begins = marked.find(_CONTENT)
        is_header = begins >= 0 and marked[:begins] == rendered[:begins]
        # What is asked after is the same history in both.
        return begins if is_header and _agreed(prompt, marked[:begins]) >= _agreed(self._render(turn), prompt) else None

    def _closing(self, turn: int, prompt: str, written: str) -> str | None:
        """The end of a thought that the prompt has opened.

        As the template writes it before an answer (`written`), as the prompt without thoughts has it, or as is usual.
        """
        asked = _agreed(self._render(turn), prompt)
        tag = end_of_open_tag(prompt[asked:])
        if tag and (at := written.find(tag, asked)) >= 0:
            return written[at:]
        for option in self._template.switches:
            without = self._prompt_with(turn, {option: False})
            if without.startswith(prompt) and len(without) > len(prompt):
                return without[len(prompt) :]
        if not tag or tag not in self._template.text(self._tools):
            return None
        usual = f"\n{tag}\n\n"
        self.notices.append(f"the chat template never shows the end of a thought: {usual!r} is trained")
        return usual

    def _prompt_with(self, turn: int, options: Options) -> str:
        return self._template.try_render(
            self._messages[:turn], self._tools, generation_prompt=True, options={**self._options, **options}
        )

    def _fits(self, turn: int, message: Message, options: Options) -> bool:
        """Whether the turn, thought and all, follows its prompt under these options."""
        prompt, rendered = self._prompt_with(turn, options), self._with_last(turn, message, options)
        return bool(prompt) and rendered.startswith(prompt) and left_out(rendered[len(prompt) :], message) is None

    def _left_out(self, turn: int, kind: str) -> InvalidRow:
        role = self._messages[turn]["role"]
        cuts = "</think>" in text_of(self._messages[turn].get("content"))
        if kind == "content" and cuts and role == "assistant":
            return InvalidRow(
                "left out by the chat template",
                f"turn {turn + 1} (assistant) says </think> among its words, and the chat template cuts it off there; "
                "take it out, or write the thought as reasoning_content",
            )
        if kind != "thought":
            return InvalidRow(
                "left out by the chat template",
                f"the chat template leaves out what turn {turn + 1} ({role}) says ({kind}); take it out of the row, or "
                "give a template that renders it as data.chat_template_path",
            )
        message = self._messages[turn]
        choices = [
            f"{{{option}: true}}" for option in self._template.switches if self._fits(turn, message, {option: True})
        ]
        asks = "give a template that writes it as data.chat_template_path"
        if choices:
            asks = f"ask for it with data.chat_template_kwargs: {' or '.join(choices)}"
        return InvalidRow(
            "thought left out by the chat template",
            f"the chat template leaves out the thought of turn {turn + 1} ({role}); {asks}, or leave thoughts out of "
            "training with data.thoughts: drop",
        )


def _agreed(one: str, other: str) -> int:
    """How many leading characters two texts share."""
    return len(commonprefix([one, other]))  # noqa: RUF071 - characters are meant, not parts of a path


def _closes_tag(prompt: str, rest: str) -> bool:
    """Whether an answer begins with the end of the tag that its prompt ends with."""
    tag = end_of_open_tag(prompt)
    return bool(tag) and rest.lstrip().startswith(tag)


def _rewritten(turn: int) -> InvalidRow:
    return InvalidRow(
        "rewritten by the chat template",
        f"the chat template's generation prompt for turn {turn + 1} (assistant) is no prefix of the rendered turn, so "
        "what the model must write is unknown; give another template as data.chat_template_path",
    )


def groups(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    """Turns that one text holds in their places, the last turn's group first; each list ends with the longest."""
    rest = list(turns)
    while rest:
        last = rest[-1]
        whole = last.prompt + last.target
        together = [turn for turn in rest if whole.startswith(turn.prompt + turn.target)]
        yield together
        rest = [turn for turn in rest if turn not in together]
