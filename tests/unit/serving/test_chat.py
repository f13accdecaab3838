"""A conversation: the same words as `generate`, streamed; base beside adapted; adapters switched; mistakes told."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import PeftModel
from rich.console import Console
from transformers import AutoTokenizer

from tests.faults.conftest import MODEL
from toolkit.adapters import attach_lora
from toolkit.data import ChatForm, Dialogue
from toolkit.errors import ModelError, RecipeError
from toolkit.evaluate import answer
from toolkit.mtp.decode import Speculator
from toolkit.mtp.drafts import speculator
from toolkit.quant import load_int8
from toolkit.serving import Conversation, Screen, talk
from toolkit.serving.chat import _AnswerStreamer

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
    return Conversation(adapted(4, seed=0), plain_dialogue(), max_new_tokens=8)


def plain_dialogue() -> Dialogue:
    """How the embedded model is asked."""
    return Dialogue(AutoTokenizer.from_pretrained(MODEL), ChatForm())


def spoken(conversation: Conversation, messages: list[dict[str, str]]) -> str:
    """What `answer` gives, without a stream."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return answer(conversation.model, tokenizer, [ids], max_new_tokens=8)[0]


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


def test_thought_text_and_calls_are_told_apart() -> None:
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    dialogue = Dialogue(AutoTokenizer.from_pretrained(MODEL), ChatForm(), chat_template=template)
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call><|im_end|>'
    for text, told in (
        ("<think>\nit is é\n</think>\n\nSo é.", "[thought] it is é\n[answer] So é."),
        (f"Look.\n{call}", 'Look.\n{"arguments": {"a": "é"}, "name": "f"}'),
        (f"<think>\nhm\n</think>\n\n{call}", '[thought] hm\n[answer] {"arguments": {"a": "é"}, "name": "f"}'),
        ("a <think", "a <think"),
    ):
        words: list[str] = []
        teller = _AnswerStreamer(
            dialogue, dialogue.prompt_ids([{"role": "user", "content": "q"}]), words.append, skip_prompt=False
        )
        for token in dialogue.tokens.of([text])[0]:
            teller.put(torch.tensor([token]))
        teller.end()
        assert "".join(words) == told
        assert not any("</" in each or "\ufffd" in each for each in words)


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
        Conversation(adapted(2, seed=1), conversation.dialogue), [{"role": "user", "content": QUESTION}]
    )
    assert first != second
    conversation.switch("default")
    assert conversation.say(QUESTION, heard([])) == first
    with pytest.raises(RecipeError, match="known: base, default, other-v1"):
        conversation.switch("nobody")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="not an adapter of this model"):
        conversation.switch(str(tmp_path / "empty"))
    assert conversation.adapter == "default"
    assert conversation.names == ["base", "default", "other-v1"]


def test_commands_and_the_end(conversation: Conversation) -> None:
    words: list[str] = []
    ours: list[str] = []
    screen = Screen(heard(words), heard(ours))
    lines = iter(["/adapter", "/adapter base", "/sing", "/adapter nobody", "/help", "/mtp on", "/compare maybe",
                  QUESTION, "/reset", "/quit", "never"])  # fmt: skip
    talk(conversation, lines, screen)
    assert next(lines) == "never"
    assert ours[0] == "using default; choices: base, default"
    assert ours[1].startswith("using base")
    assert "/sing: no such command" in ours[2]
    assert "nobody: no adapter of that name" in ours[3]
    assert "/mtp [on|off]" in ours[4]
    assert "nothing to draft with" in ours[5]
    assert ours[6] == "/compare maybe: say on or off"
    assert ours[7] == "forgotten"
    assert conversation.messages == []
    assert "".join(words).endswith("\n")
    words.clear()
    talk(conversation, ["/compare on", QUESTION, ""], screen)
    assert "".join(words).count("base: ") == 2, "the base answers, and the base is who speaks"


def test_drafts_are_switched_on_and_off_and_change_no_word(conversation: Conversation, other: Path) -> None:
    made: list[Speculator] = []

    def make() -> Speculator:
        made.append(speculator(conversation.model, None, count=3, max_new_tokens=8, measured=False))
        return made[-1]

    conversation.make_drafts = make
    wanted = spoken(conversation, [{"role": "user", "content": QUESTION}])
    pieces: list[str] = []
    ours: list[str] = []
    screen = Screen(heard(pieces), heard(ours))
    talk(conversation, ["/mtp", "/mtp on", QUESTION, "/mtp"], screen)
    assert "".join(pieces).strip() == wanted
    assert len(pieces) > 2, "it came in one piece"
    assert ours[:2] == ["drafts off", "drafts on"]
    assert len(made) == 1
    assert (made[0].counts.passes > 0) == ("tokens/pass" in ours[2])
    before = copy.deepcopy(made[0].counts)
    pieces.clear()
    talk(conversation, ["/reset", f"/adapter {other}", QUESTION], screen)
    talk(conversation, ["/adapter default", "/reset", "/mtp off", QUESTION], screen)
    assert "".join(pieces).strip().endswith(wanted)
    assert made[0].counts == before, "another adapter, or off: nobody drafts"


def test_two_columns_on_a_terminal_that_is_wide_enough(conversation: Conversation) -> None:
    conversation.compare = True
    base = spoken_by_base(conversation)
    own = spoken(conversation, [{"role": "user", "content": QUESTION}])
    told: list[str] = []

    def shown(width: int, terminal: bool) -> str:
        stream = io.StringIO()
        console = Console(file=stream, width=width, force_terminal=terminal, color_system=None)
        conversation.reset()
        talk(conversation, [QUESTION], Screen(heard(told), heard([]), console))
        return stream.getvalue()

    drawn = shown(100, terminal=True)
    assert told == []
    header, *answers = re.sub(r"\x1b\[[\d?]*[A-Za-z]", "", drawn[drawn.rindex("base") :]).splitlines()
    assert header.split() == ["base", "default"]
    place = header.index("default")
    assert " ".join(line[:place] for line in answers).split() == base.split()
    assert " ".join(line[place:] for line in answers).split() == own.split()
    for width, terminal in ((40, True), (100, False)):
        told.clear()
        assert shown(width, terminal) == ""
        assert "".join(told).split() == ["base:", *base.split(), "default:", *own.split()]


def spoken_by_base(conversation: Conversation) -> str:
    with conversation.model.disable_adapter():
        return spoken(conversation, [{"role": "user", "content": QUESTION}])


def test_a_model_does_not_reach_the_terminal() -> None:
    told: list[str] = []
    terminal = Console(file=io.StringIO(), force_terminal=True)
    Screen(heard(told), heard([]), terminal).words("a\x1b]0;title\x07\n")
    Screen(heard(told), heard([])).words("\x1b")
    assert told == ["a\\x1b]0;title\\x07\n", "\x1b"]
