"""Greedy answers in left-padded batches, by transformers' own `generate`; and sampled ones in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.evaluate.sampler import Sampler, require_drawable, why_not_shared
from toolkit.mtp.head import MtpHead
from toolkit.steps import advance

__all__ = ["AnswerWriter", "answer", "answer_ids", "read_answers", "sampling", "writing"]

_DRAWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Options of sampling that TRL and transformers call the same."""


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    read: Callable[[Sequence[int], Sequence[int]], str] | None = None,
) -> list[str]:
    """Text that follows each prompt (token ids), special tokens removed.

    Args:
        temperature: 0 is greedy; above it samples.
        read: makes text of an answer's token ids and its prompt's, where a plain decoding would not do.
    """
    written = answer_ids(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature
    )
    return read_answers(tokenizer, written, prompts, read)


def read_answers(
    tokenizer: PreTrainedTokenizerBase,
    written: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    read: Callable[[Sequence[int], Sequence[int]], str] | None = None,
) -> list[str]:
    """The text of answers' token ids, as `answer` gives it."""
    if read is not None:
        return [read(ids, prompt) for ids, prompt in zip(written, prompts, strict=True)]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in written]


@torch.no_grad()
def answer_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    drawn: Mapping[str, Any] | None = None,
    written: Callable[[list[int], list[list[int]], int], None] | None = None,
) -> list[list[int]]:
    """Tokens that follow each prompt, up to and with the end token where one came.

    Args:
        drawn: how `generate` samples, by its names, instead of `temperature`.
        written: told after each batch which prompts it held, their answers, and the width that prompts were padded to.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    ends, done = _ends(model), 0
    drawn = drawn if drawn is not None else sampling(temperature) if temperature > 0 else None
    for batch in _similar_lengths(prompts, batch_size):
        width = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), width), _pad(tokenizer), device=model.device)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=_pad(tokenizer),
            **(
                {"do_sample": False}
                if drawn is None
                else {"do_sample": True, "logits_processor": [_Drawable()], **drawn}
            ),
        )
        for index, tokens in zip(batch, output[:, width:].tolist(), strict=True):
            stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            answers[index] = tokens[: stop + 1]
        if written:
            written(batch, [answers[index] for index in batch], width)
        done += len(batch)
        advance(done, len(prompts), "answers")
    return answers


class _Drawable(LogitsProcessor):  # type: ignore[misc]
    """Raises `DivergedError` where no token could be drawn."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores [B, V] as they are."""
        require_drawable(scores)
        return scores


@contextmanager
def writing(model: PreTrainedModel) -> Iterator[None]:
    """Within the block a model in training can write; settings come back as they were.

    TRL switches router logits on for training, and generation then fails on its growing attention mask.
    """
    config, was_training = model.config.get_text_config(), model.training
    held = (model.config.use_cache, getattr(config, "output_router_logits", False))
    model.config.use_cache, config.output_router_logits = True, False
    model.eval()
    try:
        yield
    finally:
        model.config.use_cache, config.output_router_logits = held
        model.train(was_training)


class AnswerWriter:
    """Sampled answers to prompts, all at once, in the middle of training.

    A family whose cache cannot be shared by the answers to one prompt, or give drafts back, is found by trying; then
    each answer reads its prompt, or nothing is drafted.

    Args:
        options: `max_completion_length` and how to sample, by TRL's names.
        head: drafts `count` tokens a pass, where given. note: is told what cannot be done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any],
        *,
        head: MtpHead | None = None,
        count: int = 1,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.tokenizer, self.note = model, tokenizer, note
        self.room: int = options["max_completion_length"]
        self.drawn = {name: options[name] for name in _DRAWN}
        self.head, self.count = head, count

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Token ids of an answer to each prompt."""
        with writing(self.model):
            if sampler := self._sampler:
                return sampler.write(prompts)
            return answer_ids(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens=self.room,
                batch_size=len(prompts),
                drawn=self.drawn,
            )

    def figures(self) -> dict[str, float]:
        """What became of drafts since this was asked last; nothing where there were none."""
        sampler = self.__dict__.get("_sampler")
        return sampler.figures() if sampler else {}

    @cached_property
    def _sampler(self) -> Sampler | None:
        """The fastest way that gives this family's own numbers; None where that is `generate`."""
        for head in (self.head, None) if self.head else (None,):
            sampler = Sampler(self.model, self.drawn, self.room, pad=_pad(self.tokenizer), head=head, count=self.count)
            why = why_not_shared(sampler)
            if why is None:
                return sampler
            lost = "no drafts" if head else "each answer reads its prompt"
            self.note(f"written answers: {lost}: this family's cache does not allow it ({why})")
        return None


def _ends(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {int(ends)}


def sampling(temperature: float) -> dict[str, Any]:
    """What `generate` is told; a temperature of 0 is greedy."""
    return {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}


def _similar_lengths(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad) if isinstance(pad, int) else 0
