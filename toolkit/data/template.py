"""A chat template at work: a conversation to text, under the run's template options and on the run's date.

transformers' `apply_chat_template` renders with today's date, so that a run interrupted before midnight could not go
on after it; its environment for templates is used, with the date of the run. Jinja's sandbox keeps a template from
attributes and code, but not from looping for ever or doubling a string until memory ends, and a template comes with a
checkpoint, so from strangers: each is tried first in a process of its own, short of time and memory.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import resource
import select
import signal
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta
from transformers.utils.chat_template_utils import _compile_jinja_template

from toolkit.data.conversation import FLAGS, THOUGHT_FIELDS, Message
from toolkit.data.problems import InvalidRow
from toolkit.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "MOST_BYTES",
    "MOST_SECONDS",
    "NOT_OPTIONS",
    "ChatTemplate",
    "Options",
    "end_of_open_tag",
    "require_frugal",
]

MOST_SECONDS = 1
"""Of processor time, for a handful of short conversations, which take a well-meant template milliseconds."""
_PATIENCE = 60.0
"""Seconds of waiting for them on a machine that does something else."""
MOST_BYTES = 256 << 20
"""Memory beyond what the process has already."""


_tried: set[Hashable] = set()
"""What was found frugal in this process: a fork of a large one takes long."""

Options = Mapping[str, Any]
"""What a template is told beside the conversation, such as `enable_thinking`."""

NOT_OPTIONS = frozenset(
    (
        *("messages", "conversation", "conversations", "tools", "chat_template", "tokenize", "padding", "truncation"),
        *("add_generation_prompt", "continue_final_message", "max_length"),
    )
)
"""Arguments of a rendering that are neither a recipe's nor a row's to give."""

# What a template can raise on a conversation it does not expect: Jinja's own, and those of the Python values in it.
_RAISED = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})
_SWITCH = re.compile(r"(think|reason)(?!.*(effort|budget|mode|tokens|content))")
_OPEN_TAG = re.compile(r"<([^<>\s/]+)>\s*$")
_PROBE = "onecardprobe"
_MISSPELT = 0.8
"""A likeness of names at which they are the same word: `thinking` is not `enable_thinking`, `enable_thinkin` is."""


def require_frugal(render: Callable[[], object], key: Hashable) -> None:
    """Run `render` in a fork, once for each `key`; errors that it raises are not this function's business.

    Raises:
        DataError: it needs more than `MOST_SECONDS` of processor time or `MOST_BYTES`.
    """
    if key in _tried:
        return
    watch, held = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: this one runs Python alone
        child = os.fork()
    if child == 0:
        _render_and_leave(render, watch)
    os.close(held)
    # The pipe closes when the child is gone: a wait with a time limit, which waitpid has not.
    if not select.select([watch], [], [], _PATIENCE)[0]:
        os.kill(child, signal.SIGKILL)
    os.close(watch)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        raise DataError(f"chat template: a short conversation took over {MOST_SECONDS} s; give another")
    if code != 0:
        raise DataError(
            f"chat template: needs more than {MOST_BYTES >> 20} MiB for a short conversation; give another as "
            "data.chat_template_path"
        )
    _tried.add(key)


def _render_and_leave(render: Callable[[], object], watch: int) -> None:
    code = 1
    try:
        os.close(watch)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        most = _address_space() + MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        render()
        code = 0
    except MemoryError:
        pass
    except BaseException:  # the template's own refusals are told where it is used
        code = 0
    finally:
        os._exit(code)


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[0]) * resource.getpagesize()


class ChatTemplate:
    """One tokenizer's template, or one that stands in for it.

    Args:
        tokenizer: its special tokens are given to the template.
        chat_template: Jinja text to use instead of the tokenizer's.
        options: given to the template at every rendering; a row may add its own.
        date: what `strftime_now` says; today where none is given.

    Raises:
        DataError: there is no template, it is not Jinja, or it runs away; an option is none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        *,
        options: Mapping[str, Any] = {},
        date: datetime.date | None = None,
    ) -> None:
        if chat_template is None and tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template and the data is chat; set data.chat_template_path")
        if taken := sorted(options.keys() & NOT_OPTIONS):
            raise DataError(f"data.chat_template_kwargs: {taken[0]} cannot be set here; remove it")
        self._tokenizer = tokenizer
        self._given = chat_template
        self._specials = dict(tokenizer.special_tokens_map)
        self.options = dict(options)
        day = datetime.datetime.combine(date or datetime.date.today(), datetime.time(12))
        self._always = {**self._specials, "strftime_now": day.strftime, **options}
        given = (chat_template or tokenizer.chat_template, self._specials, self.options)
        require_frugal(self._render_samples, repr(given))

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set itself, with tools or without."""
        return _variables(self.text()) | _variables(self.text(()))

    def unread(self, options: Options) -> list[str]:
        """A sentence for each option of the run, and of a row, that the template does not read.

        Raises:
            DataError: one of the run's is nearly one that it reads. InvalidRow: one of the row's is.
        """
        if misspelt := self.misspelt(self.options):
            raise DataError(f"data.chat_template_kwargs: {misspelt}")
        if misspelt := self.misspelt(options):
            raise InvalidRow("bad chat_template_kwargs", f"chat_template_kwargs: {misspelt}")
        names = [name for name in {**self.options, **options} if name not in self.variables]
        near = {name: did_you_mean(name, self._known) for name in names}
        return [
            f"data.chat_template_kwargs: {name}: the chat template reads no such option{near[name]}" for name in names
        ]

    def misspelt(self, options: Options) -> str:
        """What is wrong with the first option that is nearly one that the template reads and nobody gives."""
        known = [name for name in self._known if name not in {**self.options, **options}]
        unread = [name for name in options if name not in self.variables]
        found = ((name, did_you_mean(name, known, likeness=_MISSPELT)) for name in unread)
        return next((f"{name}: the chat template reads no such option{near}" for name, near in found if near), "")

    @property
    def _known(self) -> list[str]:
        """Options that somebody may have meant."""
        return sorted(self.variables - {*_GIVEN, *self._specials, *_compile_jinja_template(self.text()).globals})

    @property
    def switches(self) -> list[str]:
        """Options that may switch thoughts on or off, by their names."""
        return sorted(name for name in self.variables - {*_GIVEN} if _SWITCH.search(name))

    def text(self, tools: Any = None) -> str:
        """The template itself; some tokenizers have one for conversations with tools."""
        return str(self._tokenizer.get_chat_template(self._given, tools))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        generation_prompt: bool = False,
        options: Mapping[str, Any] = {},
    ) -> str:
        """The conversation as text.

        Args:
            options: of this conversation; they go before those of the run.

        Raises:
            InvalidRow: the template refuses it. DataError: the template is not Jinja.
        """
        try:
            text: str = _compile_jinja_template(self.text(tools)).render(
                {
                    "documents": None,
                    **self._always,
                    **options,
                    "messages": _for_templates(messages),
                    "tools": tools,
                    "add_generation_prompt": generation_prompt,
                }
            )
            text.encode("utf-8")
        except jinja2.TemplateSyntaxError as error:
            raise _not_jinja(error) from None
        except UnicodeEncodeError:
            raise InvalidRow("not Unicode", "it has an unpaired surrogate (\\ud800…\\udfff)") from None
        except _RAISED as error:
            detail = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise InvalidRow("refused by the chat template", f"the chat template refuses it: {detail}") from None
        return text

    def try_render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        generation_prompt: bool = False,
        options: Mapping[str, Any] = {},
    ) -> str:
        """As `render`; nothing where the template refuses it."""
        try:
            return self.render(messages, tools, generation_prompt=generation_prompt, options=options)
        except InvalidRow:
            return ""

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


def end_of_open_tag(text: str) -> str:
    """What closes the tag that a text ends with: `</think>` after `<think>`; nothing where it ends otherwise."""
    tag = _OPEN_TAG.search(text)
    return f"</{tag.group(1)}>" if tag else ""


def _for_templates(messages: Sequence[Message]) -> list[Message]:
    """Messages as transformers gives them to templates: a thought under both usual keys, and no flags of training."""
    return [_for_template(message) for message in messages]


def _for_template(message: Message) -> Message:
    thought = next((message[key] for key in THOUGHT_FIELDS if message.get(key) is not None), None)
    if thought is not None:
        message = {"thinking": thought, **message, "reasoning_content": thought}
    if not message.keys().isdisjoint(FLAGS):
        message = {key: value for key, value in message.items() if key not in FLAGS}
    return message


@lru_cache
def _variables(template: str) -> frozenset[str]:
    try:
        return frozenset(meta.find_undeclared_variables(_compile_jinja_template(template).environment.parse(template)))
    except jinja2.TemplateSyntaxError as error:
        raise _not_jinja(error) from None


def _not_jinja(error: jinja2.TemplateSyntaxError) -> DataError:
    what = (error.message or type(error).__name__).rstrip(".")
    return DataError(f"chat template, line {error.lineno}: {what}; it is not valid Jinja")
