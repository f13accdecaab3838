"""Prompt and answer apart: under tokenizers that write a space before every text, an answer gets none of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from toolkit.data import ChatForm, Dialogue
from toolkit.data.encode import EncodedRow, Encoder
from toolkit.data.formats import Example

TEXT = (Path(__file__).parents[3] / "recipes" / "general" / "austen.txt").read_text(encoding="utf-8")[:40_000]
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TIGHT = SPACED.replace("' ' + m.content", "m.content")


def piecewise(scheme: str) -> Any:
    """A tokenizer as SentencePiece makes them, that marks spaces and may write one before a text."""
    special = ["<unk>", "<s>", "</s>"]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made.train_from_iterator(TEXT.splitlines(), trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def encoded(tokenizer: Any, example: Example, template: str | None = None) -> Any:
    [row] = Encoder(tokenizer, Dialogue(tokenizer, ChatForm(), chat_template=template)).encode([example])
    assert isinstance(row, EncodedRow)
    [one] = row.examples
    return one


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize(("template", "space"), [(SPACED, "▁"), (TIGHT, "")])
def test_an_answer_has_the_tokens_that_it_has_in_its_place(template: str, space: str, scheme: str) -> None:
    tokenizer = piecewise(scheme)
    turns = ("what time", "the house", "why so", "my dear")
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns))
    one = encoded(tokenizer, Example("here", messages=messages), template)
    whole = tokenizer.apply_chat_template(list(messages), chat_template=template)["input_ids"]
    assert one.ids.tolist() == whole
    trained = "".join(tokenizer.convert_ids_to_tokens(one.ids[one.trained].tolist()))
    assert trained == f"{space}the▁house</s>{space}my▁dear</s>"


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_completion_goes_on_where_its_prompt_ends(scheme: str) -> None:
    tokenizer = piecewise(scheme)
    one = encoded(tokenizer, Example("here", prompt="what time:", text="what time: the house"))
    fed = tokenizer("what time:")["input_ids"]
    assert one.ids.tolist()[: len(fed)] == fed
    said = one.ids.tolist()[len(fed) :]
    assert "".join(tokenizer.convert_ids_to_tokens(said)) == "▁the▁house</s>"
    assert tokenizer.decode(one.ids.tolist()[1:-1]) == "what time: the house"
