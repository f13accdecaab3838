"""The tokens that end an answer: those that the checkpoint declares, and the one with which its template closes a turn.

A model learns to stop by the token that its training text ends in, so generation has to stop at that one, too. Many
base checkpoints declare another; some templates close a turn with the header of the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from toolkit.data.conversation import CALLS, Message
from toolkit.data.problems import InvalidRow
from toolkit.data.said import texts_of
from toolkit.data.template import ChatTemplate, Options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Stops", "any_of"]

_FIRST, _SECOND = "onecardprobefirst", "onecardprobesecond"
_RESULTS = ("tool", "environment", "function")
_ASKED: Message = {"role": "user", "content": "onecardprobeasked"}
_ANSWERS: tuple[Message, ...] = tuple({"role": "assistant", "content": word} for word in (_FIRST, _SECOND))


class Stops:
    """What ends a turn under one template.

    Args:
        tokenizer: its end-of-sequence token is declared, too.
        declared: token ids from the checkpoint's generation_config.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, declared: Iterable[int]) -> None:
        self._template = template
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(map(str, tokenizer.all_special_tokens))
        self.special = any_of(special)
        self._added = any_of({token.content for token in added} | special)
        ids = {*declared, tokenizer.eos_token_id} - {None}
        # An id beyond the vocabulary, which some checkpoints declare, has no text.
        self.texts = {str(text) for token in ids if token >= 0 and (text := tokenizer.convert_ids_to_tokens(token))}
        """The texts of all tokens at which generation stops."""
        text = template.try_render((_ASKED, *_ANSWERS[:1], _ASKED, *_ANSWERS[1:]))
        runs = [self._run_after(text, word) for word in (_FIRST, _SECOND)]
        self._closes_answers = bool(runs[1])
        # A token that directly follows earlier and last answers alike, where no declared one closes both.
        spaced = zip(*(self._run_after(text, word, r"\s*") for word in (_FIRST, _SECOND)), strict=False)
        closing = {token for token, _ in takewhile(lambda pair: pair[0] == pair[1], spaced)}
        if runs[1] and runs[0] == runs[1] and not self.texts & closing:
            self.texts.add(runs[1][-1])
        self._look_for_texts()

    def _look_for_texts(self) -> None:
        self._stop = any_of(self.texts)
        self.control = re.compile(f"{self.special.pattern}|{self._stop.pattern}")
        """Special tokens and stop tokens: text that is no text to the model."""

    def first(self, text: str) -> str | None:
        """The first stop token in a text, None where it has none."""
        found = self._stop.search(text)
        return found.group() if found else None

    def through(
        self, rest: str, messages: Sequence[Message], turn: int, tools: Any, options: Options
    ) -> tuple[str, str]:
        """The answer through its first stop token, and that token's text.

        Args:
            rest: what the rendering has after the prompt.

        Raises:
            InvalidRow: nothing ends the turn.
        """
        if found := self._stop.search(rest):
            return rest[: found.end()], found.group()
        closing = _last_of(self.special, rest) or _last_of(self._added, rest)
        # What stands after calls may be their own wrapper, where answers without calls are closed by nothing.
        if closing is not None and (self._closes_answers or not messages[turn].get(CALLS)):
            return self._learn(rest[: closing[1]], rest[closing[0] : closing[1]])
        return self._learn(*self._through_next_header(rest, messages, turn, tools, options))

    def _through_next_header(
        self, rest: str, messages: Sequence[Message], turn: int, tools: Any, options: Options
    ) -> tuple[str, str]:
        """The answer and the special token with which the next turn begins."""
        after = self._template.try_render((*messages[: turn + 1], self._next(messages, turn)), tools, options=options)
        # What stands before its last words may be written otherwise once another turn follows.
        tail = rest[_last_words(rest, messages[turn]) :].rstrip()
        at = after.rfind(tail)
        while at >= 0:
            if header := self._leading(after, at + len(tail)):
                return rest.rstrip() + after[at + len(tail) : header.end()], header.group(1)
            at = after.rfind(tail, 0, at)
        raise InvalidRow(
            "no end of turn",
            f"nothing ends turn {turn + 1} (assistant), so the model would never stop: the chat template closes it "
            "with no special token; give one that ends answers with the eos_token as data.chat_template_path",
        )

    def _learn(self, target: str, ender: str) -> tuple[str, str]:
        self.texts.add(ender)
        self._look_for_texts()
        return target, ender

    def _next(self, messages: Sequence[Message], turn: int) -> Message:
        """The turn that follows, or one that would: the result of a call, else a question."""
        calls = messages[turn].get(CALLS)
        following = messages[turn + 1] if turn + 1 < len(messages) else {"role": ""}
        if following["role"] in (_RESULTS if calls else ("user",)):
            return following
        if not calls:
            return {"role": "user", "content": _SECOND}
        name = calls[0].get("function", calls[0])["name"]
        return {"role": "tool", "content": _SECOND, "tool_call_id": calls[0].get("id", "0"), "name": name}

    def _leading(self, text: str, start: int) -> re.Match[str] | None:
        return re.compile(rf"\s*({self.special.pattern})").match(text, start)

    def _run_after(self, text: str, word: str, between: str = "") -> list[str]:
        """Special tokens side by side right after a word, with what matches `between` them."""
        if (at := text.rfind(word)) < 0:
            return []
        run = re.compile(rf"\s*((?:(?:{self.special.pattern}){between})+)").match(text, at + len(word))
        return self.special.findall(run.group(1)) if run else []


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern of any of these, the longest first; one that never matches where there is none."""
    longest = sorted((text for text in texts if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def _last_of(token: re.Pattern[str], text: str) -> tuple[int, int] | None:
    """Where the token stands with which a text ends, white space apart."""
    end = len(text.rstrip())
    found = [each.span() for each in token.finditer(text, 0, end) if each.end() == end]
    return found[-1] if found else None


def _last_words(text: str, message: Message) -> int:
    """Where the last line of what a message says begins in its rendering."""
    lines = (told.strip().rpartition("\n")[2].strip() for _, told in texts_of(message))
    return max((text.rfind(line) for line in lines if line), default=0)
