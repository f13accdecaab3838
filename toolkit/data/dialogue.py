"""How a trained model is asked and read: the same prompt in training, evaluation, `generate`, `chat` and `serve`.

The form of a run (chat or plain text, template options, date, what ends an answer) is a value that is recorded with
the run and its artifact, so that nothing has to be guessed again at inference.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolkit.data.answers import Answer, AnswerReader, AnswerStream
from toolkit.data.conversation import Message, text_of
from toolkit.data.problems import InvalidRow
from toolkit.data.stops import any_of
from toolkit.data.template import ChatTemplate
from toolkit.data.training_template import training_template
from toolkit.data.turns import Turn, TurnReader
from toolkit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from toolkit.data.formats import Example

__all__ = ["ChatForm", "Dialogue", "Tokens"]

_WORD = "word"


class Tokens:
    """A tokenizer for prompts and what follows them.

    Raises:
        DataError: it is not a fast one, or has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError("the tokenizer is not a fast one; the checkpoint needs a tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token, so no answer could end; set its eos_token")
        self._tokenizer: Any = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        end, after = self.of([f"{_WORD}\n", f"{_WORD}\n{_WORD}"])
        self._is_prefixing = after[: len(end)] != end or after[len(end) :] != self.of([_WORD])[0]

    def of(self, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
        """Tokens of each text; `plain` text gets the tokenizer's own special tokens, templates write theirs."""
        if not texts:
            return []
        batch = self._tokenizer(
            list(texts),
            add_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = batch["input_ids"]
        return [self._begun(each) for each in ids] if plain else ids

    def after(
        self, pairs: Sequence[tuple[str, str]], prompts: Sequence[list[int]], *, plain: bool = False
    ) -> list[list[int]]:
        """Tokens of each pair's second text where it follows the first, whose tokens are `prompts`."""
        if not self._is_prefixing:
            return self.of([text for _, text in pairs])
        wholes = self.of([before + text for before, text in pairs], plain=plain)
        alone = self.of([text for _, text in pairs])
        return [
            whole[len(prompt) :] if whole[: len(prompt)] == prompt and len(whole) > len(prompt) else apart
            for whole, prompt, apart in zip(wholes, prompts, alone, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of these tokens, as it is."""
        return str(
            self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def _begun(self, ids: list[int]) -> list[int]:
        """Plain text to be gone on with: at most one beginning-of-sequence token, and no end."""
        bos = self._tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.eos else ids


@dataclass(frozen=True)
class ChatForm:
    """What inference has to do as training did.

    `form` is `text` where rows were plain prompts and completions, which no chat template may touch. `date` is what the
    template prints as today's. `stop_token_ids` end an answer.
    """

    form: Literal["chat", "text"] = "chat"
    stop_token_ids: tuple[int, ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""
    system_prompt: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is empty is left out."""
        told = {**asdict(self), "stop_token_ids": list(self.stop_token_ids)}
        return {name: value for name, value in told.items() if value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChatForm:
        """The inverse of `to_dict`; keys that this version does not know are left out."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if values.get(name) is not None}
        return cls(**{**known, "stop_token_ids": tuple(known.get("stop_token_ids", ()))})


class Dialogue:
    """Prompts for a model under one form, and its answers read.

    Args:
        form: as recorded, or as far as it is known before the data are read.
        chat_template: Jinja text to use instead of the tokenizer's.
        thoughts: `drop` leaves the thoughts of rows out.

    Raises:
        DataError: the tokenizer cannot do it; at the first chat, the template cannot.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        form: ChatForm,
        *,
        chat_template: str | None = None,
        thoughts: Literal["keep", "drop"] = "keep",
    ) -> None:
        self.tokens = Tokens(tokenizer)
        self._tokenizer, self._given = tokenizer, form
        self._template, self._thoughts = chat_template, thoughts

    @cached_property
    def reader(self) -> TurnReader:
        """Prompts and targets of conversations."""
        return self._reader(self._template)

    def _reader(self, chat_template: str | None) -> TurnReader:
        given = self._given
        date = datetime.date.fromisoformat(given.date) if given.date else None
        template = ChatTemplate(self._tokenizer, chat_template, options=given.chat_template_kwargs, date=date)
        return TurnReader(self._tokenizer, template, stop_token_ids=given.stop_token_ids, thoughts=self._thoughts)

    @cached_property
    def _for_training(self) -> tuple[Path, TurnReader] | None:
        """TRL's template for training in this one's place, and what reads rows by it."""
        found = training_template(self._tokenizer, self._template)
        with contextlib.suppress(DataError):  # a template that needs what this tokenizer has not
            return None if found is None else (found[0], self._reader(found[1]))
        return None

    def turns(self, example: Example, wanted: Sequence[int]) -> list[Turn]:
        """As `TurnReader.read`; a refusal names TRL's template for training where the row can be read by that one."""
        try:
            return self.reader.read(example, wanted)
        except InvalidRow as problem:
            if self._for_training is None or not _reads(self._for_training[1], example, wanted):
                raise
            told = f"{problem.detail}; TRL's template for training takes it: data.chat_template_path: "
            raise InvalidRow(problem.reason, f"{told}{self._for_training[0]}") from None

    @cached_property
    def _answers(self) -> AnswerReader:
        return AnswerReader(self._tokenizer, self.tokens.decode, self.reader)

    @property
    def is_chat(self) -> bool:
        """Whether inference asks by the chat template."""
        has_template = self._template is not None or self._tokenizer.chat_template is not None
        return self._given.form == "chat" and has_template

    @property
    def eos_text(self) -> str:
        """The tokenizer's end-of-sequence token."""
        return str(self._tokenizer.eos_token)

    @property
    def form(self) -> ChatForm:
        """The form with every token that ended a turn so far."""
        texts = self.reader.stops.texts if self.is_chat else set()
        learnt = [int(token) for token in self._tokenizer.convert_tokens_to_ids(sorted(texts))]
        stops = {*self._given.stop_token_ids, self.tokens.eos, *learnt}
        return replace(self._given, stop_token_ids=tuple(sorted(stops)))

    @property
    def options(self) -> frozenset[str]:
        """Names of the options that the chat template reads."""
        return self.reader.template.variables if self.is_chat else frozenset()

    def require_meant(self, options: Mapping[str, Any]) -> None:
        """Refuse an option that is nearly one that the chat template reads.

        Raises:
            InvalidRow: there is one.
        """
        if self.is_chat and (misspelt := self.reader.template.misspelt(options)):
            raise InvalidRow("bad chat_template_kwargs", f"chat_template_kwargs: {misspelt}")

    def prompt_ids(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None, options: Mapping[str, Any] = {}
    ) -> list[int]:
        """What the model is fed for the answer to `messages`; the last one's plain text where it learnt from text.

        `options` of this conversation go before those of the run.
        """
        if not self.is_chat:
            return self.tokens.of([text_of(messages[-1].get("content"))], plain=True)[0]
        system = self._given.system_prompt
        if system and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        return self.tokens.of([self.reader.prompt(messages, tools, options)])[0]

    def read(self, ids: Sequence[int], prompt_ids: Sequence[int]) -> Answer:
        """What the model has written after a prompt: its thought, text and calls."""
        if not self.is_chat:
            return Answer(self.tokens.decode(ids, skip_special_tokens=True).strip())
        return self._answers.read(ids, prompt_ids)

    def stream(self, prompt_ids: Sequence[int]) -> AnswerStream:
        """As `read`, of an answer that is being written, from its text, special tokens and all."""
        if self.is_chat:
            return self._answers.stream(self.tokens.decode(prompt_ids))
        special = any_of(map(str, self._tokenizer.all_special_tokens))
        return AnswerStream(lambda text, _: _bare(special, text), lambda text: _bare(special, text))

    def judged(self, ids: Sequence[int], prompt_ids: Sequence[int], *, chat: bool = True) -> str:
        """What is judged of an answer: its text and calls, without the thought."""
        if not chat:
            return self.tokens.decode(ids, skip_special_tokens=True).strip()
        return self.read(ids, prompt_ids).judged


def _reads(reader: TurnReader, example: Example, wanted: Sequence[int]) -> bool:
    try:
        reader.read(example, wanted)
    except InvalidRow:
        return False
    return True


def _bare(special: re.Pattern[str], text: str) -> Answer:
    return Answer(special.sub("", text).strip())
