"""Examples to tokens with a loss mask, by character offsets of the whole text.

TRL tokenises prompt and prompt + completion apart and takes the difference, which moves the boundary wherever a token
spans it. Here the text is tokenised once, as a model meets it, and a token is trained if its last character is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from toolkit.data.formats import Example
from toolkit.data.problems import InvalidRow
from toolkit.data.report import HeldOut
from toolkit.data.template import ChatRenderer
from toolkit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CUT_OFF", "TOO_LONG", "Encoded", "Encoder"]

TOO_LONG = "longer than max_length"
CUT_OFF = "answer beyond max_length"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as tokens: `ids` and `trained`, both (T,), and what an evaluator needs where it was asked for."""

    place: str
    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    held_out: HeldOut | None


@dataclass(frozen=True, slots=True)
class _Text:
    """The text of an example and its trained character spans; the last one is the answer."""

    text: str
    spans: tuple[tuple[int, int], ...]
    chat: bool
    everything: bool


class Encoder:
    """Tokenises examples and marks what is trained.

    Args:
        tokenizer: a fast tokenizer (character offsets) with an end-of-sequence token.
        chat_template: Jinja text to use instead of the tokenizer's.
        assistant_only_loss: train assistant turns only, or the whole conversation.
        completion_only_loss: train completions only, or the prompts too.
        truncation: what happens to an example of more than `max_length` tokens.
        max_length: tokens.

    Raises:
        DataError: the tokenizer cannot do it, or the chat template is not Jinja.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        assistant_only_loss: bool = True,
        completion_only_loss: bool = True,
        truncation: Literal["drop", "keep_start"] = "drop",
        max_length: int = 1024,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError("the tokenizer has no character offsets; the checkpoint needs a tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token, so no answer could end; set its eos_token")
        self._tokenizer: Any = tokenizer
        self._chat_template = chat_template
        self._renderer: ChatRenderer | None = None
        self._all_turns = not assistant_only_loss
        self._all_text = not completion_only_loss
        self._cut = truncation == "keep_start"
        self._max_length = max_length
        self._special_texts = {str(token) for token in tokenizer.all_special_tokens}
        self.notices: Counter[str] = Counter()
        """What deserves a look but is no error, and how many examples it concerns."""

    def enders(self) -> list[int]:
        """Token ids that end a turn: the end-of-sequence token, and whatever closed the turns seen so far."""
        closers = self._renderer.closers if self._renderer else set()
        return [int(self._tokenizer.eos_token_id), *map(int, self._tokenizer.convert_tokens_to_ids(sorted(closers)))]

    def encode(self, examples: Sequence[Example], *, hold_out: bool = False) -> list[Encoded | InvalidRow]:
        """Each example's tokens, or why it cannot be used; `hold_out` also keeps its prompt and answer apart."""
        texts = [self._text(example) for example in examples]
        results: list[Encoded | InvalidRow] = []
        for example, text, tokens in zip(examples, texts, self._tokenize(texts), strict=True):
            if isinstance(text, InvalidRow) or tokens is None:
                results.append(text if isinstance(text, InvalidRow) else InvalidRow("nothing trained", "no tokens"))
            else:
                results.append(self._mask(example, text, *tokens, hold_out))
        return results

    def _text(self, example: Example) -> _Text | InvalidRow:
        try:
            text = self._chat(example) if example.messages else self._plain(example)
        except InvalidRow as problem:
            return problem
        self._note(example)
        return text

    def _chat(self, example: Example) -> _Text:
        if self._renderer is None:
            self._renderer = ChatRenderer(self._tokenizer, self._chat_template)
        everything = self._all_text if example.given else self._all_turns
        text, answers = self._renderer.answers(example, last_only=everything)
        spans = tuple((a.start, a.end) for a in answers if a.turn >= example.given)
        if example.tools and not all(_tool_name(tool) in text for tool in example.tools):
            self.notices["the chat template leaves out the tools"] += 1
        return _Text(text, spans, chat=True, everything=everything)

    def _plain(self, example: Example) -> _Text:
        try:
            example.text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidRow("not Unicode", "half of a surrogate pair (\\ud800…\\udfff) stands alone in it") from None
        start = len(example.prompt or "")
        everything = example.prompt is None or self._all_text
        return _Text(example.text, ((start, len(example.text)),), chat=False, everything=everything)

    def _note(self, example: Example) -> None:
        said = [str(turn.get("content", "")) for turn in example.messages] or [example.text]
        if any(token in content for token in self._special_texts for content in said):
            self.notices["the text of a special token stands in the data and becomes that token"] += 1

    def _tokenize(self, texts: Sequence[_Text | InvalidRow]) -> list[tuple[list[int], list[tuple[int, int]]] | None]:
        """Ids and character offsets of each text; nothing for a problem. Templates write their own special tokens."""
        tokens: list[tuple[list[int], list[tuple[int, int]]] | None] = [None] * len(texts)
        for chat in (True, False):
            chosen = {i: text.text for i, text in enumerate(texts) if isinstance(text, _Text) and text.chat is chat}
            if not chosen:
                continue
            batch = self._tokenizer(
                list(chosen.values()),
                add_special_tokens=not chat,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for i, ids, offsets in zip(chosen, batch["input_ids"], batch["offset_mapping"], strict=True):
                tokens[i] = (ids, offsets)
        return tokens

    def _mask(
        self, example: Example, text: _Text, ids: list[int], offsets: list[tuple[int, int]], hold_out: bool
    ) -> Encoded | InvalidRow:
        where = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        trained = np.full(len(ids), text.everything)
        first = end = 0
        for start, stop in text.spans:
            inside = np.flatnonzero((where[:, 1] > start) & (where[:, 1] <= stop) & (where[:, 0] < where[:, 1]))
            if not len(inside):
                return InvalidRow("nothing trained", "an answer has no token of its own; nothing in it can be trained")
            first, end = int(inside[0]), int(inside[-1]) + 1
            if where[first, 0] < start:
                self.notices["an answer begins inside a token, which is trained whole"] += 1
            # A token without characters of its own may stand between: an answer is trained without holes.
            trained[first:end] = True
        if not text.chat:
            ids, trained, first, end = self._finish(ids, trained, first, end)
        return self._fit(example, ids, trained, (first, end), hold_out)

    def _finish(
        self, ids: list[int], trained: NDArray[np.bool_], first: int, end: int
    ) -> tuple[list[int], NDArray[np.bool_], int, int]:
        """Plain text: one beginning-of-sequence token at most, and a trained end-of-sequence token at the end."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids, trained, first, end = ids[1:], trained[1:], max(first - 1, 0), end - 1
        if ids[-1] != eos:
            ids, trained = [*ids, eos], np.append(trained, True)
        trained[-1] = True
        return ids, trained, first, len(ids)

    def _fit(
        self, example: Example, ids: list[int], trained: NDArray[np.bool_], answer: tuple[int, int], hold_out: bool
    ) -> Encoded | InvalidRow:
        first, end = answer
        most = self._max_length
        if len(ids) > most and not self._cut:
            return InvalidRow(TOO_LONG, f"{len(ids)} tokens, more than training.max_length={most}")
        if not trained[:most].any():
            return InvalidRow(CUT_OFF, f"its answer begins beyond training.max_length={most}")
        held_out = None
        if hold_out and 0 < first < most and (example.messages or example.prompt is not None):
            said = self._tokenizer.decode(ids[first:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            held_out = HeldOut(example.place, tuple(ids[:first]), example.question, said.strip())
        return Encoded(example.place, np.asarray(ids[:most], dtype=np.int32), trained[:most].copy(), held_out)


def _tool_name(tool: dict[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, dict) else ""
