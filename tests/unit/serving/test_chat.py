"""A conversation: the same words as `generate`, streamed; base beside adapted; adapters switched; mistakes told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from tests.faults.conftest import MODEL
from toolkit.adapters import attach_lora
from toolkit.errors import ModelError, RecipeError
from toolkit.evaluate import answer, encode_chat
from toolkit.quant import load_int8
from toolkit.serving import Conversation, talk

QUESTION = "Which category is it: oak - a tree?"


def adapted(rank: int, seed: int) -> PeftModel:
    """The embedded model with an adapter that changes what it says."""
    model, _ = load_int8(str(MODEL), dtype=torch.float32, device="cpu", experts_implementation="onecard_per_expert")
    torch.manual_seed(seed)
    peft_model = attach_lora(model, r=rank)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return peft_model.eval()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of another adapter, of another rank."""
    folder = tmp_path_factory.mktemp("adapters") / "other.v1"
    adapted(2, seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def conversation() -> Conversation:
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    return Conversation(adapted(4, seed=0), tokenizer, max_new_tokens=8)


def spoken(conversation: Conversation, messages: list[dict[str, str]]) -> str:
    """What `answer` gives, without a stream."""
    ids = encode_chat(conversation.tokenizer, messages)
    return answer(conversation.model, conversation.tokenizer, [ids], max_new_tokens=8)[0]


def heard(words: list[str]) -> Callable[[str], None]:
    return words.append


def test_the_answer_is_streamed_and_remembered(conversation: Conversation) -> None:
    pieces: list[str] = []
    first = [{"role": "user", "content": QUESTION}]
    wanted = spoken(conversation, first)
    assert conversation.say(QUESTION, heard(pieces)) == wanted
    assert "".join(pieces).strip() == wanted
    assert len(pieces) > 1, "it came in one piece"
    again = [*first, {"role": "assistant", "content": wanted}, {"role": "user", "content": "Why?"}]
    wanted = spoken(conversation, again)
    assert conversation.say("Why?", heard([])) == wanted
    conversation.reset()
    assert conversation.messages == []


def test_the_base_answers_beside_and_is_not_remembered(conversation: Conversation) -> None:
    base: list[str] = []
    own: list[str] = []
    reply = conversation.say_to_both(QUESTION, heard(base), heard(own))
    with conversation.model.disable_adapter():
        unadapted = spoken(conversation, [{"role": "user", "content": QUESTION}])
    assert "".join(base).strip() == unadapted != "".join(own).strip() == reply
    assert [message["content"] for message in conversation.messages] == [QUESTION, reply]


def test_adapters_are_switched(conversation: Conversation, other: Path, tmp_path: Path) -> None:
    first = conversation.say(QUESTION, heard([]))
    conversation.reset()
    conversation.switch(str(other))
    assert conversation.names == ["base", "default", "other-v1"]
    second = conversation.say(QUESTION, heard([]))
    conversation.reset()
    assert second == spoken(
        Conversation(adapted(2, seed=1), conversation.tokenizer), [{"role": "user", "content": QUESTION}]
    )
    assert first != second
    conversation.switch("default")
    assert conversation.say(QUESTION, heard([])) == first
    with pytest.raises(RecipeError, match="there are base, default, other-v1"):
        conversation.switch("nobody")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="not an adapter of this model"):
        conversation.switch(str(tmp_path / "empty"))
    assert conversation.adapter == "default"
    assert conversation.names == ["base", "default", "other-v1"]


def test_commands_and_the_end(conversation: Conversation) -> None:
    words: list[str] = []
    ours: list[str] = []
    lines = iter(["/adapter", "/adapter base", "/sing", "/adapter nobody", QUESTION, "/reset", "/quit", "never"])
    talk(conversation, lines, heard(words), heard(ours), compare=False)
    assert next(lines) == "never"
    assert ours[0] == "default speaks; there are base, default"
    assert ours[1].startswith("base speaks")
    assert "/sing: no such command" in ours[2]
    assert "nobody: no adapter of that name" in ours[3]
    assert ours[4] == "forgotten"
    assert conversation.messages == []
    assert "".join(words).endswith("\n")
    words.clear()
    talk(conversation, [QUESTION, ""], heard(words), heard(ours), compare=True)
    assert "".join(words).count("base: ") == 2, "the base answers, and the base is who speaks"
